"""Compare backbones, or whole models, in speed and memory, at several image sizes.

    python tools/benchmark.py --models saga_t pvt_t pvt_t_sdpa --baseline pvt_t \
        --sizes 512 1024 --mode infer train --out work_dirs/benchmark

Each cell of the table is measured in a fresh process, several times, in rounds in which the models
take turns. Time is the median over rounds; its spread is the range over rounds. Memory is the peak
that the work adds to the loaded model and the input. FLOPs, counted in one more process, are those
of the work on one image, two per multiply-add, in matrix products, convolutions and attention.
Writes benchmark.md, benchmark.png, and results.jsonl, from which an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import saga_mm  # noqa: F401
from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.cost import FORMULAS
from saga_mm.analysis.measure import DTYPES, added_memory, timed
from saga_mm.apis import build_model
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, keep_freed_memory, load_config, run_tool

PVT_T = dict(type='mmdet.PyramidVisionTransformer', num_layers=[2, 2, 2, 2])
KNOWN = {
    **{f'saga_{arch}': dict(type='saga_mm.SAGA', arch=arch) for arch in 'tsml'},
    **{f'sola_vision_{arch}': dict(type='saga_mm.SoLAVision', arch=arch) for arch in 'tsb'},
    **{f'ravlt_{arch}': dict(type='saga_mm.RAVLT', arch=arch) for arch in 'tsbl'},
    'pvt_t': PVT_T,
    'pvt_t_sdpa': PVT_T,
    'swin_t': dict(type='mmdet.SwinTransformer'),
}
# Stands for a round in which FLOPs are counted: the counter needs time and memory of its own.
COUNT = 'count'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=['saga_t', 'pvt_t', 'pvt_t_sdpa'],
        help=f'{", ".join(KNOWN)}; the name of a registered backbone, such as mmdet.ResNet; or the '
        'config file of a detector or segmentor',
    )
    parser.add_argument('--baseline', help='the model that ratios refer to. Defaults to the first')
    parser.add_argument('--sizes', nargs='+', type=int, default=[512, 768, 1024, 1280])
    parser.add_argument('--mode', nargs='+', choices=['infer', 'train'], default=['infer'])
    parser.add_argument('--dtype', nargs='+', choices=list(DTYPES), default=['fp32'])
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--keep-memory',
        action='store_true',
        help='on a CPU: a process keeps the memory that it frees, as in tools/infer.py',
    )
    parser.add_argument(
        '--no-flops', action='store_true', help='do not count FLOPs, which takes one more process'
    )
    parser.add_argument('--rounds', type=int, default=3, help='measurements of each cell')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'))
    add_options(parser, config=False)
    parser.add_argument('--cell', type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    args.baseline = args.baseline or args.models[0]
    if args.baseline not in args.models:
        raise ValueError(f'--baseline must be one of {args.models}, got {args.baseline!r}')
    for name in ('batch_size', 'rounds'):
        if getattr(args, name) < 1:
            raise ValueError(
                f'--{name.replace("_", "-")} must be positive, got {getattr(args, name)}'
            )
    if min(args.sizes) < 32:
        raise ValueError(f'--sizes must be at least 32 pixels, got {min(args.sizes)}')
    device = torch.device(args.device)
    if args.keep_memory and device.type != 'cpu':
        raise ValueError(f'--keep-memory is for --device cpu, got {args.device}')
    for name in args.models:
        if name not in KNOWN and not Path(name).is_file() and '.' not in name:
            raise ValueError(
                f'--models: {name!r} is none of {tuple(KNOWN)}, no file, no scope.Name'
            )


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], object]]:
    """A model, and how to call it on images (B, 3, H, W)."""
    if Path(name).is_file():
        return build_model(load_config(name, {}, ('model',))), call_whole
    model = MODELS.build(KNOWN.get(name, dict(type=name)))
    if name.endswith('_sdpa'):
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                # the weights, which nobody reads, keep it from scaled_dot_product_attention
                module.forward = partial(module.forward, need_weights=False)
    return model, nn.Module.__call__


def call_whole(model: nn.Module, images: Tensor) -> object:
    size = tuple(images.shape[-2:])
    info = dict(img_shape=size, ori_shape=size, batch_input_shape=size, scale_factor=(1, 1))
    samples = [BaseDataElement(metainfo=info) for _ in images]
    return model(images, samples, mode='tensor')


def tensors(outputs: object) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = outputs.values()
    return (
        [x for output in outputs for x in tensors(output)] if hasattr(outputs, '__iter__') else []
    )


def measure(cell: dict) -> dict:
    """Seconds per image, and the bytes that the work adds, in this process; or FLOPs."""
    device, dtype = torch.device(cell['device']), DTYPES[cell['dtype']]
    torch.manual_seed(0)
    model, call = build(cell['model'])
    train = cell['mode'] == 'train'
    if cell['keep_memory'] and cell['round'] != COUNT and not keep_freed_memory():
        raise OSError('--keep-memory needs glibc')
    # Batch norms keep their statistics, which need more than one value.
    model.to(device).eval().requires_grad_(train)
    channels = getattr(getattr(model, 'backbone', model), 'input_channels', 3)
    images = torch.randn(cell['batch_size'], channels, cell['size'], cell['size'], device=device)
    # a mask of the padding: there is none
    images[:, 3:] = 1

    def step() -> None:
        model.zero_grad()
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32),
        ):
            outputs = tensors(call(model, images))
        if train:
            sum(x.float().mean() for x in outputs if x.requires_grad).backward()

    if cell['round'] == COUNT:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            step()
        return dict(flops=counter.get_total_flops() / cell['batch_size'])
    added = added_memory(step, device)
    times = timed(step, device)
    return dict(
        seconds=statistics.median(times) / cell['batch_size'],
        bytes=added,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def make_cells(args: argparse.Namespace) -> list[dict]:
    """Every measurement, so ordered that the models take turns."""
    rounds = list(range(args.rounds)) + ([] if args.no_flops else [COUNT])
    settings = product(args.mode, args.dtype, args.sizes, rounds, args.models)
    names = ('mode', 'dtype', 'size', 'round', 'model')
    common = dict(
        device=args.device,
        batch_size=args.batch_size,
        threads=torch.get_num_threads(),
        keep_memory=args.keep_memory,
    )
    return [dict(zip(names, values, strict=True), **common) for values in settings]


def summarize(results: list[dict], baseline: str) -> list[dict]:
    """One row for each model, mode, dtype and size: medians over rounds, ratios to the baseline."""
    rows, flops = {}, {}
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


def describe_machine(args: argparse.Namespace) -> str:
    if torch.device(args.device).type == 'cuda':
        processor = torch.cuda.get_device_name(args.device)
    else:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
        processor = (
            f'{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads'
        )
    kept = ', freed memory kept' if args.keep_memory else ''
    return f'{processor}, torch {torch.__version__}, batch {args.batch_size}{kept}'


def table(rows: list[dict], args: argparse.Namespace) -> str:
    lines = [
        f'{describe_machine(args)}; medians of {args.rounds} rounds, spread: their range.',
        f'Speed-up and memory ratio: against {Path(args.baseline).stem}.',
        '',
        '| mode | dtype | side | model | parameters, M | GFLOPs | images/s | spread | ns/token '
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
            f'{per_token(row):.0f}',
            f'{row["speedup"]:.2f}' if 'speedup' in row else '',
            f'{row["bytes"] / 2**20:.0f}',
            f'{row["memory"]:.2f}' if 'memory' in row else '',
        ]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines)


def per_token(row: dict) -> float:
    """Nanoseconds per token of the finest map, of stride 4."""
    return 1e9 * row['seconds'] / (row['size'] / 4) ** 2


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    groups = sorted({(row['mode'], row['dtype']) for row in rows})
    values = {
        'images per second': lambda row: 1 / row['seconds'],
        'peak memory, MiB': lambda row: row['bytes'] / 2**20,
        'ns per token': per_token,
    }
    figure, axes = plt.subplots(
        len(groups), 3, figsize=(13, 3.6 * len(groups)), squeeze=False, layout='constrained'
    )
    models = list(dict.fromkeys(row['model'] for row in rows))
    for line, (mode, dtype) in zip(axes, groups, strict=True):
        for axis, (name, value) in zip(line, values.items(), strict=True):
            for model in models:
                points = [
                    (row['size'], value(row))
                    for row in rows
                    if (row['mode'], row['dtype'], row['model']) == (mode, dtype, model)
                    and 'error' not in row
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker='o', label=Path(model).stem)
            axis.set(xlabel='side of the image, pixels', ylabel=name, title=f'{mode}, {dtype}')
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        line[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def run(args: argparse.Namespace) -> None:
    check(args)
    make_folder(args.out)
    results = run_cells(make_cells(args), __file__, args.out / 'results.jsonl')
    rows = summarize(results, args.baseline)
    text = table(rows, args)
    print(text)
    (args.out / 'benchmark.md').write_text(text + '\n')
    plot(rows, args.out / 'benchmark.png')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.cell:
        torch.set_num_threads(args.cell['threads'])
        print(json.dumps(measure(args.cell)))
        return
    run_tool(run, args)


if __name__ == '__main__':
    main()
