"""Look at a folder of data of your own, and write a config that trains on it.

python -m saga_mm new --task segmentation --data FOLDER

Segmentation takes images with masks, in folders such as `images/train` and `masks/train` or without
a split; detection takes COCO files beside images. What can't be trained on is named and left out.
Nothing is written to the folder of the data.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
import sys
from pathlib import Path

from saga_mm.checkpoint import printable
from saga_mm.cli import add_options, check_data, load_config, print_written, run_tool
from saga_mm.own_data import survey_detection, survey_segmentation


def mask_value(text: str) -> int | tuple[int, int, int]:
    """A value in masks, or a colour such as 255,0,0."""
    if not re.fullmatch(r'\d+(,\d+,\d+)?', text):
        raise argparse.ArgumentTypeError(f'expected a value or a colour R,G,B, got {text!r}')
    numbers = [int(number) for number in text.split(',')]
    if len(numbers) == 1:
        return numbers[0]
    red, green, blue = numbers
    return red, green, blue


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--task', required=True, choices=['segmentation', 'detection'])
    parser.add_argument('--data', required=True, type=Path, metavar='FOLDER', help='the data')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help='the config. Defaults to the name of the folder, with .py, in the current folder',
    )
    parser.add_argument(
        '--classes',
        nargs='+',
        default=(),
        metavar='NAME',
        help='names of the classes in masks, in the order of their values. Defaults to the lines '
        'of FOLDER/classes.txt if there is one',
    )
    parser.add_argument(
        '--ignore',
        nargs='+',
        type=mask_value,
        default=(),
        metavar='VALUE',
        help='values in masks that count for no class, beside 255, or colours such as 0,0,0',
    )
    for what in ('images', 'masks'):
        parser.add_argument(
            f'--{what}',
            metavar='FOLDER',
            help=f'folder of the {what} in that of the data, if it has no usual name',
        )
    parser.add_argument('--force', action='store_true', help='overwrite files that exist')
    add_options(parser, config=False)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    root = args.data.resolve()
    if not root.is_dir():
        raise ValueError(f'data must be a folder, got {args.data}')
    out = args.out or Path(re.sub(r'\W+', '_', root.name) + '.py')
    if out.suffix != '.py':
        raise ValueError(f'out must be the name of a config, which ends in .py, got {out}')
    if out.resolve().is_relative_to(root):
        raise ValueError(f'out must not be in the folder of the data, got {out}: name another')
    print(printable(str(args.data)), flush=True)
    if args.task == 'detection':
        if args.classes or args.ignore or args.images or args.masks:
            raise ValueError('--classes, --ignore, --images and --masks are for segmentation')
        survey = survey_detection(root, out.stem)
    else:
        survey = survey_segmentation(
            root, out.stem, args.classes, args.ignore, args.images, args.masks
        )
    print(survey.text)
    files = survey.write(out, args.force)
    # what toolboxes print when they are imported is no part of the survey
    with contextlib.redirect_stdout(sys.stderr):
        check_data(load_config(out, {}, ('model',)), ('train', 'val'))
    print()
    print_written(*files)
    print(f'to train: python -m saga_mm train {shlex.quote(str(out))}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
