"""Measures speed and memory of backbones and whole models, and tabulates them.

A cell is one measurement: a model in one mode, dtype, image size and round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import saga_mm  # noqa: F401

from ..apis import build_model
from ..cli import keep_freed_memory, load_config
from .cost import FORMULAS
from .files import make_figure, write_figure
from .measure import DTYPES, added_memory, captured, random_images, timed
from .whole_models import HEADS, build_whole, make_samples, measure_parts

PVT_T = dict(type='mmdet.PyramidVisionTransformer', num_layers=[2, 2, 2, 2])
KNOWN: dict[str, dict] = {
    **{f'saga_{arch}': dict(type='saga_mm.SAGA', arch=arch) for arch in 'tsml'},
    **{f'sola_vision_{arch}': dict(type='saga_mm.SoLAVision', arch=arch) for arch in 'tsb'},
    **{f'ravlt_{arch}': dict(type='saga_mm.RAVLT', arch=arch) for arch in 'tsbl'},
    'pvt_t': PVT_T,
    'pvt_t_sdpa': PVT_T,
    'pvtv2_b1': dict(
        type='mmdet.PyramidVisionTransformerV2', embed_dims=64, num_layers=[2, 2, 2, 2]
    ),
    'mit_b1': dict(type='mmseg.MixVisionTransformer', embed_dims=64, num_layers=[2, 2, 2, 2]),
    'swin_t': dict(type='mmdet.SwinTransformer'),
    'resnet50': dict(type='mmdet.ResNet', depth=50),
    # needs the extra `pretrain`
    'convnext_t': dict(
        type='mmpretrain.ConvNeXt',
        arch='tiny',
        out_indices=(0, 1, 2, 3),
        # maps, and not their means
        gap_before_final_norm=False,
    ),
}
# the names in pictures
TITLES = {
    **{f'saga_{arch}': f'SAGA-{arch.upper()}' for arch in 'tsml'},
    **{f'sola_vision_{arch}': f'SoLA-Vision-{arch.upper()}' for arch in 'tsb'},
    **{f'ravlt_{arch}': f'RAVLT-{arch.upper()}' for arch in 'tsbl'},
    'pvt_t': 'PVT-T',
    'pvt_t_sdpa': 'PVT-T with SDPA',
    'pvtv2_b1': 'PVTv2-B1',
    'mit_b1': 'MiT-B1',
    'swin_t': 'Swin-T',
    'resnet50': 'ResNet-50',
    'convnext_t': 'ConvNeXt-T',
    'upernet': 'UperNet',
    'upernet128': 'UperNet of 128 channels',
    'semantic_fpn': 'Semantic FPN',
    'segformer_head': "SegFormer's head",
    'mask_rcnn': 'Mask R-CNN',
    'retinanet': 'RetinaNet',
}
MODES = dict(infer='inference', graph='inference as a CUDA graph', train='training step')
# Takes the place of the number of a round if the cell counts FLOPs: the counter needs time and
# memory of its own, so it must not run while these are measured.
COUNT = 'count'


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], object]]:
    """Build a model, and return it with a function that calls it on images (B, 3, H, W)."""
    head, _, backbone = name.rpartition('+')
    if is_config(name):
        model, call = build_model(load_config(name, {}, ('model',))), call_whole
    elif head:
        model, call = build_whole(head, KNOWN[backbone]), call_whole
    else:
        model, call = MODELS.build(KNOWN.get(name, dict(type=name))), nn.Module.__call__
    if name.endswith('_sdpa'):
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                # returning the weights, which are not used, rules out scaled_dot_product_attention
                forward = partial(module.forward, need_weights=False)
                module.forward = forward  # type: ignore[method-assign]
    return model, call


def is_whole(name: str) -> bool:
    """Whether a name stands for a detector or segmentor, not for a backbone alone."""
    return is_config(name) or '+' in name


def is_config(name: str) -> bool:
    """Whether a name stands for a config: a file, or one of a package."""
    return Path(name).suffix == '.py' or '::' in name or Path(name).is_file()


def is_known(name: str) -> bool:
    """Whether there is a model of this name in `KNOWN`, or a head on one of them."""
    head, plus, backbone = name.rpartition('+')
    return backbone in KNOWN and (head in HEADS or not plus)


def title(name: str) -> str:
    """The name of a model in pictures."""
    if not is_known(name):
        return Path(name).stem if is_config(name) else name
    return ' + '.join(TITLES[part] for part in name.split('+'))


def is_ours(name: str) -> bool:
    """Whether a model of `KNOWN`, alone or under a head, has a backbone of this project."""
    return KNOWN.get(name.rpartition('+')[2], {}).get('type', '').startswith('saga_mm.')


def call_whole(model: nn.Module, images: Tensor) -> object:
    return model(images, make_samples(images), mode='tensor')


def tensors(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return (
        [x for output in outputs for x in tensors(output)] if hasattr(outputs, '__iter__') else []
    )


def measure(cell: dict) -> dict:
    """Measure a cell in this process.

    Returns:
        `seconds` per image, `bytes` that the work adds to the memory, and `parameters`; or, if the
        round is `COUNT`, `flops` per image. In the mode 'parts', as of `measure_parts`.
    """
    device, dtype = torch.device(cell['device']), DTYPES[cell['dtype']]
    torch.set_num_threads(cell['threads'])
    torch.manual_seed(0)
    model, call = build(cell['model'])
    train = cell['mode'] == 'train'
    if cell['keep_memory'] and cell['round'] != COUNT and not keep_freed_memory():
        raise OSError('--keep-memory needs glibc')
    # Eval mode, because batch norms can't compute statistics of a single value. One call after the
    # other, because `eval` of some backbones of mmdet returns nothing.
    model.to(device)
    model.eval()
    model.requires_grad_(train)
    backbone = getattr(model, 'backbone', model)
    images = random_images(backbone, (cell['batch_size'], cell['size'], cell['size']), device)
    if cell['mode'] == 'parts':
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return dict(parts=measure_parts(model, images))

    def step() -> None:
        model.zero_grad()
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            outputs = tensors(call(model, images))
        if train:
            torch.stack([x.float().mean() for x in outputs if x.requires_grad]).sum().backward()

    if cell['round'] == COUNT:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            step()
        return dict(flops=counter.get_total_flops() / cell['batch_size'])
    added = added_memory(step, device)
    if cell['mode'] == 'graph':
        step = captured(step, device)
    times = timed(step, device)
    return dict(
        seconds=statistics.median(times) / cell['batch_size'],
        bytes=added,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def make_cells(
    models: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[str],
    sizes: Sequence[int],
    rounds: int,
    flops: bool = True,
    **common: object,
) -> list[dict]:
    """List the cells, in an order in which the models take turns.

    Args:
        models: Names of `KNOWN` or of registered backbones, and config files.
        modes: Of `MODES`.
        dtypes: Of `DTYPES`.
        sizes: Sides of square images, in pixels.
        rounds: Measurements of each.
        flops: Also count FLOPs. Defaults to True.
        **common: Settings of all cells: device, batch_size, threads, keep_memory.
    """
    turns = [*range(rounds), *([COUNT] if flops else [])]
    names = ('mode', 'dtype', 'size', 'round', 'model')
    settings = product(modes, dtypes, sizes, turns, models)
    return [dict(zip(names, values, strict=True), **common) for values in settings]


def summarize(results: list[dict], baseline: str) -> list[dict]:
    """Make a row for each model, mode, dtype and size: medians over rounds, and their ratios."""
    rows: dict[tuple, list[dict]] = {}
    flops = {}
    for result in results:
        key = tuple(result[name] for name in ('mode', 'dtype', 'size', 'model'))
        if result['round'] == COUNT:
            flops[key] = result.get('flops')
        else:
            rows.setdefault(key, []).append(result)
    summary = {}
    for (mode, dtype, size, model), rounds in rows.items():
        row = dict(mode=mode, dtype=dtype, size=size, model=model)
        errors = [result['error'] for result in rounds if 'error' in result]
        if errors:
            row['error'] = errors[0]
        else:
            seconds = [result['seconds'] for result in rounds]
            row.update(
                seconds=statistics.median(seconds),
                spread=(max(seconds) - min(seconds)) / statistics.median(seconds),
                bytes=statistics.median(result['bytes'] for result in rounds),
                parameters=rounds[0]['parameters'],
                flops=flops.get((mode, dtype, size, model)),
            )
        summary[mode, dtype, size, model] = row
    for (mode, dtype, size, _), row in summary.items():
        base = summary[mode, dtype, size, baseline]
        if 'error' not in row and 'error' not in base:
            row['speedup'] = base['seconds'] / row['seconds']
            row['memory'] = row['bytes'] / base['bytes']
    return list(summary.values())


def table(rows: list[dict]) -> str:
    """Format the rows of `summarize` as a table in Markdown."""
    lines = [
        '| mode | dtype | side | model | parameters, M | GFLOPs | images/s | spread | us/token '
        '| speed-up | peak memory, MiB | memory ratio |',
        '|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|',
    ]
    for row in rows:
        cells = [row['mode'], row['dtype'], row['size'], Path(row['model']).stem]
        if 'error' in row:
            lines.append('| ' + ' | '.join(map(str, cells)) + f' | {row["error"]} ||||||||')
            continue
        cells += [
            f'{row["parameters"] / 1e6:.1f}',
            f'{row["flops"] / 1e9:.1f}' if row['flops'] is not None else '',
            f'{1 / row["seconds"]:.3g}',
            f'{row["spread"]:.0%}',
            f'{per_token(row):.1f}',
            f'{row["speedup"]:.2f}' if 'speedup' in row else '',
            f'{row["bytes"] / 2**20:.0f}',
            f'{row["memory"]:.2f}' if 'memory' in row else '',
        ]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def per_token(row: dict) -> float:
    """Microseconds per token of the finest map, of stride 4."""
    return 1e6 * row['seconds'] / (row['size'] / 4) ** 2


def plot(rows: list[dict], path: Path) -> None:
    """Draw speed and memory against the size of the image, for each mode and dtype.

    All axes are logarithmic, so that costs which grow with the number of pixels are parallel lines,
    and models that differ a lot can be told apart. The models of this project have full lines.
    Rows without a result are left out; there must be another one. So are values of 0.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [row for row in rows if 'error' not in row]
    groups = sorted({(row['mode'], row['dtype']) for row in rows})
    values = {
        'images per second': lambda row: 1 / row['seconds'],
        # it is 0 for work that fits into memory that was free before
        'peak memory, MiB': lambda row: row['bytes'] / 2**20,
        'microseconds per token': per_token,
    }
    figure = make_figure(13, 0.8 + 3.8 * len(groups))
    axes = figure.subplots(len(groups), 3, squeeze=False)
    models = list(dict.fromkeys(row['model'] for row in rows))
    sizes = sorted({row['size'] for row in rows})
    for line, (mode, dtype) in zip(axes, groups, strict=True):
        for axis, (name, value) in zip(line, values.items(), strict=True):
            for i, model in enumerate(models):
                points = [
                    (row['size'], value(row))
                    for row in rows
                    if (row['mode'], row['dtype'], row['model']) == (mode, dtype, model)
                    and value(row) > 0
                ]
                if points:
                    style = '-' if is_ours(model) else '--'
                    axis.plot(*zip(*points, strict=True), f'C{i}o{style}', label=title(model))
            if not axis.get_lines():
                axis.set_axis_off()
                continue
            axis.set(xscale='log', yscale='log', xlabel='side of the image, pixels', ylabel=name)
            axis.set_title(f'{MODES[mode]}, {dtype}')
            axis.set_xticks(sizes, sizes)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes[:, 0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc='outside lower center', ncols=5)
    write_figure(path, figure, dpi=110, colors=256)
