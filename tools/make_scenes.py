"""Make a folder of scenes, with the layout of the project's own data set, of COCO or of ADE20K."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from saga_mm.cli import add_options, run_tool
from saga_mm.datasets.scenes import LAYOUTS, make_scenes

# Where configs look for the data sets, relative to the current folder.
DATA_ROOTS = dict(
    scenes=Path('data/scenes'), coco=Path('data/coco'), ade20k=Path('data/ade/ADEChallengeData2016')
)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, metavar='OUT', help='folder to make')
    parser.add_argument('--layout', default='scenes', help=f'one of {", ".join(LAYOUTS)}')
    for split in ('train', 'val'):
        numbers = ', '.join(f'{getattr(layout, split)} {name}' for name, layout in LAYOUTS.items())
        parser.add_argument(
            f'--{split}', type=int, metavar='N', help=f'{split} images (default: {numbers})'
        )
    sizes = ', '.join('{}x{} '.format(*layout.size) + name for name, layout in LAYOUTS.items())
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help=f'pixels (default: {sizes})'
    )
    parser.add_argument('--seed', type=int, default=0)
    add_options(parser, config=False)
    return parser.parse_args(argv)


def usage(out: Path, layout: str) -> str:
    """Explain how to use the folder with a config."""
    if out == DATA_ROOTS[layout].resolve():
        return 'configs find it there without options'
    loaders = [f'{split}_dataloader.dataset.data_root={out}' for split in ('train', 'val', 'test')]
    options = ['--cfg-options', *loaders]
    if instances := LAYOUTS[layout].instances:
        annotations = out / LAYOUTS[layout].name(instances, 'val')
        options += [f'{split}_evaluator.ann_file={annotations}' for split in ('val', 'test')]
    return 'to train on it, add to the command:\n  ' + ' \\\n    '.join(map(shlex.quote, options))


def run(args: argparse.Namespace) -> None:
    out = make_scenes(args.out, args.layout, args.train, args.val, args.size, args.seed)
    print(f'{args.layout}: {out}')
    print(usage(out, args.layout))


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
