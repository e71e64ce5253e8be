"""Measures patterns of linear and softmax layers in SoLA-Vision, and tabulates them."""

from __future__ import annotations

import hashlib
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from torch._subclasses.fake_tensor import FakeTensorMode

from ..apis import train
from ..backbones.sola_vision import LINEAR, TABLE_2, SoLAVision, resolve_pattern
from ..checkpoint import make_folder, write_atomically
from ..registry import MODELS
from .cost import measure_cost
from .files import make_figure, write_figure
from .measure import DTYPES, added_memory, random_images, timed
from .trainings import last_metrics

# For each column with numbers: the size of the unit, the number of digits, the suffix.
COLUMNS = {
    'parameters': (1e6, 2, 'M'),
    'flops': (1e9, 2, 'G'),
    'ms': (1e-3, 1, ''),
    'peak MiB': (2**20, 0, ''),
    'mIoU': (1, 2, ''),
}


def make_rows(cfg: Config, patterns: Sequence[str], linear: Sequence[str]) -> list[dict]:
    """Make a row, without results, for each pattern and kind of linear layer.

    Args:
        cfg: Config of a model with a SoLA-Vision backbone.
        patterns: What `SoLAVision(pattern=...)` takes as a string, such as 'linear', 'LLSLLS' or
            'LL/LL/LLLLLS/LL'; 'table2' stands for all of `TABLE_2`.
        linear: Names of `LINEAR`.

    Raises:
        ValueError: A pattern is not valid.
    """
    rows = []
    listed = [one for name in patterns for one in (TABLE_2 if name == 'table2' else (name,))]
    own = {k: v for k, v in cfg.model.backbone.to_dict().items() if k != 'layers'}
    for pattern, kind in dict.fromkeys(itertools.product(listed, linear)):
        arch = cfg.model.backbone.get('arch', 'tiny')
        layers = resolve_pattern(arch, pattern, SoLAVision.arch_settings)[1]
        backbone = {**own, 'type': 'saga_mm.SoLAVision', 'pattern': pattern, 'linear': kind}
        rows.append(dict(pattern=pattern, linear=kind, layers=layers, backbone=backbone))
    return rows


def make_cells(
    rows: Sequence[dict],
    cfg: Config,
    folder: Path,
    rounds: int,
    iterations: int | None,
    seeds: Sequence[int],
    device: str,
    **forward: object,
) -> list[dict]:
    """List the measurements, in an order in which the patterns take turns.

    Args:
        rows: The result of `make_rows`.
        cfg: Config of the model.
        folder: Output folder. Each training has a folder in it.
        rounds: Number of timings of each row.
        iterations: Length of the trainings; None for no training.
        seeds: Seed of each training of a row.
        device: Name of the device, such as 'cpu'.
        **forward: Settings of forward passes: size, batch_size, dtype.
    """
    threads = torch.get_num_threads()
    cells = []
    for row in rows:
        cells.append(dict(part='count', name=name_of(row), backbone=row['backbone'], **forward))
    for turn, row in itertools.product(range(rounds), rows):
        place = dict(device=device, threads=threads, round=turn)
        common = dict(name=name_of(row), backbone=row['backbone'], **forward)
        cells.append(dict(part='time', **common, **place))
    # A seed is complete before the next one starts.
    for seed, row in itertools.product(seeds if iterations else (), rows):
        inner = folder / name_of(row) / f'seed_{seed}'
        make_folder(inner)
        text = write_training(cfg, row['backbone'], iterations, seed, inner / 'config.py')
        digest = hashlib.sha256(text.encode()).hexdigest()
        place = dict(folder=str(inner), device=device, threads=threads)
        cells.append(dict(part='train', name=name_of(row), config=digest, **place))
    return cells


def name_of(row: dict) -> str:
    return f'{row["linear"]}_{row["pattern"].replace("/", "-")}'


def write_training(
    cfg: Config, backbone: dict, iterations: int | None, seed: int, path: Path
) -> str:
    """Write the config of a training; return it as text."""
    cfg = Config(cfg.to_dict())
    cfg.model.backbone = backbone
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    text = cfg.pretty_text
    write_atomically(path, text.encode())
    return text


def measure(cell: dict) -> dict:
    """Run one measurement in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(cell.get('threads', 1))
    return dict(count=count, time=run_forward, train=evaluate)[cell['part']](cell)


def run_forward(cell: dict) -> dict:
    """Measure the seconds of a forward pass, and the bytes that it adds to the memory."""
    device, dtype = torch.device(cell['device']), DTYPES[cell['dtype']]
    model = MODELS.build(cell['backbone']).to(device).eval()
    x = random_images(model, (cell['batch_size'], *cell['size']), device)

    def step() -> None:
        half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=half):
            model(x)

    added = added_memory(step, device)
    return {'ms': statistics.median(timed(step, device)), 'peak MiB': added}


def count(cell: dict) -> dict:
    """Count parameters and FLOPs, with fake tensors and the reference of linear attention."""
    model = MODELS.build({**cell['backbone'], 'impl': 'reference'}).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = random_images(model, (cell['batch_size'], *cell['size']), 'cpu')
        cost = measure_cost(model, lambda: model(x))['']
    return dict(parameters=cost.parameters, flops=cost.flops)


def evaluate(cell: dict) -> dict:
    """Train, and return the mIoU after it."""
    if cell['device'] == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    folder = Path(cell['folder'])
    train(folder / 'config.py', work_dir=folder)
    return dict(mIoU=last_metrics(folder)['mIoU'])


def fill(rows: list[dict], results: list[dict]) -> None:
    """Add to each row the medians of its results over rounds or seeds, their ranges, and its first
    error."""
    for row in rows:
        row.update(error='')
        found: dict[str, list[float]] = {}
        for result in results:
            if result['name'] != name_of(row):
                continue
            if 'error' in result and not row['error']:
                row['error'] = result['error'].removeprefix('error: ').replace('|', '/')
            for name in COLUMNS.keys() & result.keys():
                found.setdefault(name, []).append(result[name])
        row.update({name: statistics.median(values) for name, values in found.items()})
        row['ranges'] = {name: (min(values), max(values)) for name, values in found.items()}


def table(rows: Sequence[dict]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    trained = any('mIoU' in row for row in rows)
    columns = {name: how for name, how in COLUMNS.items() if name != 'mIoU' or trained}
    yield f'| pattern | linear | layers | {" | ".join(columns)} | failed |'
    yield '|---|---|---|' + '--:|' * len(columns) + '---|'
    for row in rows:
        cells = [
            f'{row[name] / unit:.{digits}f}{suffix}' if name in row else '-'
            for name, (unit, digits, suffix) in columns.items()
        ]
        low, high = row['ranges'].get('mIoU', (0, 0))
        if low < high:
            cells[-1] += f' ({low:.2f} to {high:.2f})'
        cells = [row['pattern'], row['linear'], ' '.join(row['layers']), *cells, row['error']]
        yield f'| {" | ".join(cells)} |'


def draw(rows: Sequence[dict], path: Path) -> None:
    """Draw accuracy against cost or, without trainings, time against FLOPs."""
    trained = any('mIoU' in row for row in rows)
    pairs = [('ms', 'mIoU'), ('peak MiB', 'mIoU')] if trained else [('flops', 'ms')]
    figure = make_figure(6 * len(pairs), 4.5)
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for row in rows:
            if not row.keys() >= set(pair):
                continue
            point = [row[name] / COLUMNS[name][0] for name in pair]
            color = f'C{list(LINEAR).index(row["linear"])}'
            axes.plot(*point, 'o', color=color)
            if pair[1] == 'mIoU':
                axes.vlines(point[0], *row['ranges']['mIoU'], color=color)
            label = f'{row["pattern"]}, {row["linear"]}'
            axes.annotate(
                label, point, xytext=(4, 4), textcoords='offset points', fontsize='x-small'
            )
        units = [f'{name}, {COLUMNS[name][2]}'.rstrip(', ') for name in pair]
        axes.set(xlabel=units[0], ylabel=units[1])
        axes.margins(0.3, 0.2)
    write_figure(path, figure, dpi=120, colors=256)
