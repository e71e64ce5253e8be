"""Compare patterns of softmax layers in SoLA-Vision: cost and, with --train, accuracy.

    python -m saga_mm sweep_patterns CONFIG --patterns linear every_3rd LL/LL/LLLLLS/LL
    python -m saga_mm sweep_patterns CONFIG --linear wkv gated plain decay --train 150
    python -m saga_mm sweep_patterns CONFIG --patterns table2 --train 450 --seeds 0 1 2

A pattern is one of `saga_mm.SoLAVision`: a preset, such as linear; a pattern of stage 3, such as
LLSLLS; or four patterns, separated by slashes. table2 stands for all patterns of stage 3 that the
paper of SoLA-Vision compares in its Table 2.

Parameters, FLOPs (two per multiply-add, including attention), time and memory are those of a
forward pass of the backbone. The mIoU is that of the whole model after training. Each measurement
runs in a process of its own; if it fails, the row of its pattern shows the error, and if all fail,
the exit status is 1. Times are medians over rounds, in which the patterns take turns. The mIoU is
the median over seeds, followed by their range. Memory is the peak that the work adds to the loaded
model and the input.

The tool writes patterns.md, patterns.png and cells.jsonl to the output folder. The last holds the
finished measurements, which a second run with the same settings does not repeat.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop

from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.files import check_drawing, write_text
from saga_mm.analysis.measure import DTYPES
from saga_mm.analysis.patterns import draw, fill, make_cells, make_rows, measure, table
from saga_mm.analysis.patterns import name_of as folder_of
from saga_mm.apis import select_device
from saga_mm.backbones.sola_vision import LINEAR, PRESETS, SoLAVision
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, check_data, load_config, print_written, run_tool
from saga_mm.cli.types import name_of, resolve
from saga_mm.registry import MODELS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a model with the backbone saga_mm.SoLAVision')
    parser.add_argument(
        '--patterns',
        nargs='+',
        default=list(PRESETS),
        metavar='PATTERN',
        help=f'{", ".join(PRESETS)}, table2, or such as LLSLLS or LL/LL/LLLLLS/LL. '
        'Defaults to all presets',
    )
    parser.add_argument(
        '--linear', nargs='+', choices=list(LINEAR), help="Defaults to the config's own"
    )
    parser.add_argument(
        '--train', type=int, metavar='ITERS', help='also train, for this number of iterations'
    )
    parser.add_argument(
        '--seeds', type=int, nargs='+', default=[0], help='of the trainings. Defaults to 0'
    )
    parser.add_argument('--out-dir', type=Path, help='Defaults to work_dirs/sweep_<config>')
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help="Defaults to the config's crops"
    )
    parser.add_argument('--batch-size', type=int, default=1, help='Defaults to 1')
    parser.add_argument('--dtype', choices=list(DTYPES), default='fp32', help='Defaults to fp32')
    parser.add_argument('--rounds', type=int, default=3, help='number of timings. Defaults to 3')
    add_options(parser)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Config:
    """Load the config and set defaults of the options; ValueError for options that do not fit."""
    for name in ('batch_size', 'rounds', 'train'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    cfg = load_config(args.config, args.cfg_options, ('model',))
    kind = cfg.model.backbone.type
    if resolve(kind, MODELS, cfg.get('default_scope')) is not SoLAVision:
        raise ValueError(f'model.backbone.type must be saga_mm.SoLAVision, got {name_of(kind)}')
    args.device = str(select_device(args.device))
    args.size = list(args.size or cfg.model.data_preprocessor.get('size') or (512, 512))
    if min(args.size) < 1:
        raise ValueError(f'--size must be positive, got {args.size}')
    args.out_dir = args.out_dir or Path('work_dirs', f'sweep_{Path(args.config).stem}')
    args.linear = args.linear or [cfg.model.backbone.get('linear', 'wkv')]
    if args.train:
        if (
            resolve(cfg.train_cfg.get('type'), LOOPS, cfg.get('default_scope'))
            is not IterBasedTrainLoop
        ):
            raise ValueError('--train needs a config that trains by iterations (segmentation)')
        check_data(cfg, ('train', 'val'))
    return cfg


def describe(args: argparse.Namespace, cfg: Config) -> str:
    height, width = args.size
    backbone = cfg.model.backbone
    channels = backbone.get('in_channels', 3) + bool(backbone.get('pad_mask'))
    place = 'CPU' if args.device == 'cpu' else torch.cuda.get_device_name(args.device)
    return (
        f'{args.batch_size} x {channels} x {height} x {width}, {args.dtype}, {place}, torch '
        f'{torch.__version__}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds'
        + (
            f'; mIoU after {args.train} iterations with seeds {" ".join(map(str, args.seeds))}'
            if args.train
            else ''
        )
    )


def run(args: argparse.Namespace) -> None:
    check_drawing()
    cfg = prepare(args)
    rows = make_rows(cfg, args.patterns, args.linear)
    make_folder(args.out_dir)
    forward = dict(size=args.size, batch_size=args.batch_size, dtype=args.dtype)
    cells = make_cells(
        rows, cfg, args.out_dir, args.rounds, args.train, args.seeds, args.device, **forward
    )
    results = run_cells(cells, measure, args.out_dir / 'cells.jsonl')
    fill(rows, results)
    text = '\n'.join([describe(args, cfg), '', *table(rows)])
    files = [args.out_dir / name for name in ('patterns.md', 'patterns.png', 'cells.jsonl')]
    write_text(files[0], text)
    draw(rows, files[1])
    print(f'{text}\n')
    folders = [args.out_dir / folder_of(row) for row in rows] if args.train else []
    print_written(*files, *folders)
    if all('error' in result for result in results):
        reason = f'{folder_of(rows[0])}: {rows[0]["error"]}'
        raise ValueError(f'all of {len(results)} measurements failed: {reason}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
