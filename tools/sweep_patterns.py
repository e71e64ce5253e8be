"""Compare placements of softmax layers in SoLA-Vision: cost and, with --train, accuracy.

    python tools/sweep_patterns.py CONFIG --patterns linear every_3rd LL/LL/LLLLLS/LL
    python tools/sweep_patterns.py CONFIG --linear gated plain decay --train 150

A pattern is a preset of `layers`, or four strings of L and S with slashes between them. Parameters,
FLOPs (two per multiply-add, attention included), time and memory are the backbone's, for a forward
pass; mIoU is the whole model's, after training. Every measurement has a process of its own: one
that fails costs its row a cell, and the row says why. Times are medians over rounds in which the
patterns take turns. Memory is the peak that the work adds to the loaded model and the input.

Writes patterns.md, patterns.png and cells.jsonl to the output folder. The last keeps what is
finished: a second run with the same settings does the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from torch._subclasses.fake_tensor import FakeTensorMode

from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.cost import measure_cost
from saga_mm.analysis.measure import DTYPES, added_memory, timed
from saga_mm.apis import select_device, train
from saga_mm.backbones.sola_vision import LINEAR, PRESETS, SoLAVision, resolve_layers
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, check_data, load_config, run_tool
from saga_mm.registry import MODELS

# of a row: how much one unit is, digits, the unit
COLUMNS = {
    'parameters': (1e6, 2, 'M'),
    'flops': (1e9, 2, 'G'),
    'ms': (1e-3, 1, ''),
    'peak MiB': (2**20, 0, ''),
    'mIoU': (1, 2, ''),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', nargs='?', help='config of a model on saga_mm.SoLAVision')
    parser.add_argument(
        '--patterns',
        nargs='+',
        default=list(PRESETS),
        metavar='PATTERN',
        help=f'of {", ".join(PRESETS)}, or such as LL/LL/LLLLLS/LL. Defaults to all presets',
    )
    parser.add_argument(
        '--linear', nargs='+', choices=list(LINEAR), help="Defaults to the config's own"
    )
    parser.add_argument('--train', type=int, metavar='ITERS', help='also train, for so long')
    parser.add_argument('--out-dir', type=Path, help='Defaults to work_dirs/sweep_<config>')
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to cuda, else cpu')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help="Defaults to the config's crops"
    )
    parser.add_argument('--batch-size', type=int, default=1, help='Defaults to 1')
    parser.add_argument('--dtype', choices=list(DTYPES), default='fp32', help='Defaults to fp32')
    parser.add_argument('--rounds', type=int, default=3, help='of timing. Defaults to 3')
    add_options(parser)
    parser.add_argument('--cell', type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.config and not args.cell:
        parser.error('the following arguments are required: config')
    return args


def prepare(args: argparse.Namespace) -> Config:
    """The config, and defaults of the options; ValueError for those that can't be met."""
    for name in ('batch_size', 'rounds', 'train'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    cfg = load_config(args.config, args.cfg_options, ('model',))
    kind = cfg.model.backbone.type
    if kind not in ('saga_mm.SoLAVision', 'SoLAVision'):
        raise ValueError(f'model.backbone.type must be saga_mm.SoLAVision, got {kind}')
    args.device = str(select_device(args.device))
    args.size = list(args.size or cfg.model.data_preprocessor.get('size') or (512, 512))
    if min(args.size) < 1:
        raise ValueError(f'--size must be positive, got {args.size}')
    args.out_dir = args.out_dir or Path('work_dirs', f'sweep_{Path(args.config).stem}')
    args.linear = args.linear or [cfg.model.backbone.get('linear', 'gated')]
    if args.train:
        if cfg.train_cfg.get('type') != 'IterBasedTrainLoop':
            raise ValueError('--train needs a config that trains by iterations (segmentation)')
        check_data(cfg, ('train', 'val'))
    return cfg


def make_rows(cfg: Config, args: argparse.Namespace) -> list[dict]:
    """A row of the table for each pattern and kind of linear layer, as yet without results."""
    rows = []
    for pattern, linear in dict.fromkeys(itertools.product(args.patterns, args.linear)):
        layers = pattern if pattern in PRESETS else pattern.split('/')
        arch = cfg.model.backbone.get('arch', 'tiny')
        resolved = resolve_layers(arch, layers, SoLAVision.arch_settings)[1]
        backbone = {**cfg.model.backbone.to_dict(), 'layers': layers, 'linear': linear}
        backbone['type'] = 'saga_mm.SoLAVision'
        rows.append(dict(pattern=pattern, linear=linear, layers=resolved, backbone=backbone))
    return rows


def make_cells(rows: list[dict], cfg: Config, args: argparse.Namespace) -> list[dict]:
    """Every measurement, so ordered that the patterns take turns."""
    threads = torch.get_num_threads()
    forward = dict(size=args.size, batch_size=args.batch_size, dtype=args.dtype)
    cells = []
    for row in rows:
        cells.append(dict(part='count', name=name_of(row), backbone=row['backbone'], **forward))
    for turn, row in itertools.product(range(args.rounds), rows):
        place = dict(device=args.device, threads=threads, round=turn)
        common = dict(name=name_of(row), backbone=row['backbone'], **forward)
        cells.append(dict(part='time', **common, **place))
    for row in rows if args.train else ():
        folder = args.out_dir / name_of(row)
        make_folder(folder)
        text = write_training(cfg, row['backbone'], args.train, folder / 'config.py')
        digest = hashlib.sha256(text.encode()).hexdigest()
        place = dict(folder=str(folder), device=args.device, threads=threads)
        cells.append(dict(part='train', name=name_of(row), config=digest, **place))
    return cells


def name_of(row: dict) -> str:
    return f'{row["linear"]}_{row["pattern"].replace("/", "-")}'


def write_training(cfg: Config, backbone: dict, iterations: int, path: Path) -> str:
    """Write the config of a training; return it as text."""
    cfg = Config(cfg.to_dict())
    cfg.model.backbone = backbone
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.dump(path)
    return cfg.pretty_text


def measure(cell: dict) -> dict:
    """The result of one cell, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(cell.get('threads', 1))
    return dict(count=count, time=run_forward, train=evaluate)[cell['part']](cell)


def run_forward(cell: dict) -> dict:
    """Seconds of a forward pass, and the bytes that it adds."""
    device, dtype = torch.device(cell['device']), DTYPES[cell['dtype']]
    model = MODELS.build(cell['backbone']).to(device).eval()
    x = torch.randn(cell['batch_size'], 3, *cell['size'], device=device)

    def step() -> None:
        half = dtype != torch.float32
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=half):
            model(x)

    added = added_memory(step, device)
    return {'ms': statistics.median(timed(step, device)), 'peak MiB': added}


def count(cell: dict) -> dict:
    """Parameters, and FLOPs of a pass of shapes alone, with linear attention as its reference."""
    model = MODELS.build({**cell['backbone'], 'impl': 'reference'}).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(cell['batch_size'], 3, *cell['size'])
        cost = measure_cost(model, lambda: model(x))['']
    return dict(parameters=cost.parameters, flops=cost.flops)


def evaluate(cell: dict) -> dict:
    """The mIoU after a training."""
    if cell['device'] == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    folder = Path(cell['folder'])
    train(folder / 'config.py', work_dir=folder)
    newest = max(folder.glob('*/vis_data/scalars.json'))
    entries = map(json.loads, newest.read_text().splitlines())
    return dict(mIoU=[entry['mIoU'] for entry in entries if 'mIoU' in entry][-1])


def fill(rows: list[dict], results: list[dict]) -> None:
    """Put the results into their rows: medians over rounds, and the first error."""
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


def table(rows: list[dict], args: argparse.Namespace) -> Iterator[str]:
    height, width = args.size
    place = 'CPU' if args.device == 'cpu' else torch.cuda.get_device_name(args.device)
    yield (
        f'{args.batch_size} x 3 x {height} x {width}, {args.dtype}, {place}, torch '
        f'{torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds'
        + (f'; mIoU after {args.train} iterations' if args.train else '')
    )
    columns = {name: how for name, how in COLUMNS.items() if name != 'mIoU' or args.train}
    yield ''
    yield f'| pattern | linear | layers | {" | ".join(columns)} | failed |'
    yield '|---|---|---|' + '--:|' * len(columns) + '---|'
    for row in rows:
        cells = [
            f'{row[name] / unit:.{digits}f}{suffix}' if name in row else '-'
            for name, (unit, digits, suffix) in columns.items()
        ]
        cells = [row['pattern'], row['linear'], ' '.join(row['layers']), *cells, row['error']]
        yield f'| {" | ".join(cells)} |'


def draw(rows: list[dict], args: argparse.Namespace) -> None:
    """Accuracy, or without it time, against cost."""
    pairs = [('ms', 'mIoU'), ('peak MiB', 'mIoU')] if args.train else [('flops', 'ms')]
    figure = Figure(figsize=(6 * len(pairs), 4.5), layout='constrained')
    for axes, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for row in rows:
            if not row.keys() >= set(pair):
                continue
            point = [row[name] / COLUMNS[name][0] for name in pair]
            axes.plot(*point, 'o', color=f'C{list(LINEAR).index(row["linear"])}')
            label = f'{row["pattern"]}, {row["linear"]}'
            axes.annotate(
                label, point, xytext=(4, 4), textcoords='offset points', fontsize='x-small'
            )
        units = [f'{name}, {COLUMNS[name][2]}'.rstrip(', ') for name in pair]
        axes.set(xlabel=units[0], ylabel=units[1])
        axes.margins(0.3, 0.2)
    figure.savefig(args.out_dir / 'patterns.png', dpi=120)


def run(args: argparse.Namespace) -> None:
    cfg = prepare(args)
    rows = make_rows(cfg, args)
    make_folder(args.out_dir)
    cells = make_cells(rows, cfg, args)
    fill(rows, run_cells(cells, __file__, args.out_dir / 'cells.jsonl'))
    text = '\n'.join(table(rows, args))
    (args.out_dir / 'patterns.md').write_text(f'{text}\n')
    draw(rows, args)
    print(f'{text}\n\n{args.out_dir}/patterns.md, {args.out_dir}/patterns.png')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.cell:
        print(json.dumps(measure(args.cell)))
        return
    run_tool(run, args)


if __name__ == '__main__':
    main()
