"""Export a backbone, a segmentor or a detector to a file that runs without this project.

    python -m saga_mm export CONFIG --checkpoint FILE --out backbone.onnx
    python -m saga_mm export CONFIG --checkpoint FILE --format aoti --out backbone.pt2
    python -m saga_mm export CONFIG --checkpoint FILE --part model --size 512 512 --out model.onnx

The file takes normalised images (B, C, H, W), any number of them and of any size; of one size as
aoti, with --fixed-size, and if the head has adaptive pooling, as in UperNet. A backbone returns its
maps; a segmentor the logits (B, classes, H, W), resized to the image as in predictions; a detector
with anchors, such as RetinaNet, its boxes and scores before non-maximum suppression.

The formats are onnx; aoti, a program that AOTInductor compiles for this kind of CPU, for Python and
C++; and pt2, the program of torch.export. The reference implementation is exported, in float32.

The file is written only if its outputs are those of the model, at the traced size and, if it takes
images of any size, at other sizes.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import cycle
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel

from saga_mm.apis import backbone_of, build_model, load_complete_weights
from saga_mm.apis.export import (
    BATCHES,
    Subject,
    check_format,
    describe_input,
    select,
    takes_any_size,
    verify,
    write,
)
from saga_mm.checkpoint import make_folder, use_safe_loading, write_atomically
from saga_mm.cli import add_options, load_config, run_tool

# Smallest side to trace with: torch.export takes an axis of length 1 for a constant, so that the
# map of stride 32 needs at least two rows and columns.
SMALLEST = 64
SUFFIXES = dict(onnx='.onnx', aoti='.pt2', pt2='.pt2')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument(
        '--checkpoint',
        help='weights of the model. Defaults to those of init_cfg of the backbone, else to '
        'untrained ones',
    )
    parser.add_argument('--out', required=True, type=Path, help='.onnx, or .pt2 for aoti and pt2')
    parser.add_argument('--format', choices=list(SUFFIXES), default='onnx')
    parser.add_argument('--part', choices=['backbone', 'model'], default='backbone')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('H', 'W'),
        help='size of the images: the only one, or the one to trace with if any size is accepted. '
        'Defaults to 512 512',
    )
    parser.add_argument(
        '--fixed-size', action='store_true', help='accept images of --size only, in a simpler file'
    )
    parser.add_argument(
        '--check-size',
        nargs=2,
        type=int,
        action='append',
        metavar=('H', 'W'),
        help='a further size to check if any size is accepted; can be given several times. '
        'Defaults to two odd sizes below and around --size',
    )
    add_options(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """ValueError if the file can't be written or the format not made."""
    suffix = SUFFIXES[args.format]
    if args.out.suffix != suffix:
        raise ValueError(f'--out must end in {suffix} for --format {args.format}, got {args.out}')
    if args.out.is_dir():
        raise ValueError(f'--out must be a file, got the folder {args.out}')
    if min(args.size) < 1:
        raise ValueError(f'--size must be two positive numbers, got {tuple(args.size)}')
    if args.check_size and min(map(min, args.check_size)) < 1:
        raise ValueError(f'--check-size must be two positive numbers, got {args.check_size}')
    check_format(args.format)


def make_subject(args: argparse.Namespace, model: BaseModel) -> Subject:
    """The part of the model to export, and the shapes of images to check the file with."""
    module, outputs = select(model, args.part)
    # AOTInductor of torch 2.13 can't compare the strides of channels-last maps with symbolic sizes.
    dynamic = not args.fixed_size and args.format != 'aoti' and takes_any_size(module)
    height, width = size = tuple(args.size)
    if not dynamic:
        if args.check_size:
            raise ValueError(
                f'--check-size must not be given, because the file takes images of {size} only: '
                '--fixed-size, --format aoti or a head with adaptive pooling'
            )
        # other batch sizes, with images of the same size
        others = [size, size]
    elif min(size) < SMALLEST:
        raise ValueError(f'--size must be at least {SMALLEST} pixels a side, got {size}')
    else:
        others = args.check_size or [
            (height * 3 // 4 + 1, width // 2 + 3),
            (height // 4 + 5, width + 31),
        ]
    shapes = [
        (batch, model.backbone.input_channels, *size)
        for batch, size in zip(cycle(BATCHES), [size, *others])
    ]
    axes = {0: 'batch', 2: 'height', 3: 'width'} if dynamic else {0: 'batch'}
    return Subject(module, outputs, axes, shapes)


def build(cfg: Config, checkpoint: str | None) -> BaseModel:
    """The model of a config with its weights, in eval mode on the CPU."""
    model = build_model(cfg)
    backbone = backbone_of(model, cfg.filename)
    if checkpoint:
        load_complete_weights(model, checkpoint)
    elif backbone.init_cfg:
        backbone.init_weights()
    else:
        print('there is no --checkpoint: the weights are untrained')
    return model


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    check(args)
    use_safe_loading()
    cfg = load_config(args.config, args.cfg_options, ('model',))
    make_folder(args.out.parent)
    model = build(cfg, args.checkpoint)
    subject = make_subject(args, model)
    print(describe_input(cfg))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, args.out.name)
        write(args.format, subject, file)
        try:
            verify(args.format, subject, file)
        except ValueError as error:
            raise ValueError(f'{args.out} is not written: {error}') from error
        write_atomically(args.out, file.read_bytes())
    size = '{} x {} pixels'.format(*args.size) if len(subject.axes) == 1 else 'any size'
    print(f'{args.out}: {", ".join(subject.outputs)} of images of {size}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
