"""Export a backbone or a segmentor to a file that runs without the code of this project.

    python tools/export.py CONFIG --checkpoint FILE --out backbone.onnx
    python tools/export.py CONFIG --checkpoint FILE --format aoti --out backbone.pt2
    python tools/export.py CONFIG --checkpoint FILE --part model --size 512 512 --out upernet.onnx

An exported backbone takes normalised images (B, C, H, W), any number of them and of any size (aoti:
of one size), and returns its maps. An exported segmentor takes images of one size, and returns the
logits (B, classes, H, W), resized to the image as in predictions.

The formats are onnx; aoti, a program that AOTInductor compiles for this kind of CPU, for Python and
C++; and pt2, the program of torch.export. The reference implementation is exported, in float32.

The file is written only if its outputs are those of the model, at the traced size and, if it takes
images of any size, at other sizes.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch._inductor import config as inductor

from saga_mm.apis import backbone_of, build_model, load_complete_weights
from saga_mm.apis.export import describe_input, select, verify, write
from saga_mm.checkpoint import make_folder, use_safe_loading, write_atomically
from saga_mm.cli import add_options, load_config, run_tool

# Smallest side to trace with: torch.export takes an axis of length 1 for a constant, so that the
# map of stride 32 needs at least two rows and columns.
SMALLEST = 64
SUFFIXES = dict(onnx='.onnx', aoti='.pt2', pt2='.pt2')
ONNX = ('onnx', 'onnxruntime', 'onnxscript')


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
    """Set the sizes to check; ValueError if the file can't be written or the format not made."""
    check_sizes(args)
    suffix = SUFFIXES[args.format]
    if args.out.suffix != suffix:
        raise ValueError(f'--out must end in {suffix} for --format {args.format}, got {args.out}')
    if args.out.is_dir():
        raise ValueError(f'--out must be a file, got the folder {args.out}')
    if args.format == 'onnx':
        missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"--format onnx needs {', '.join(missing)}: pip install 'saga_mm[export]'"
            )
    compilers = [name for name in inductor.cpp.cxx if name]
    if args.format == 'aoti' and not any(map(shutil.which, compilers)):
        raise ValueError(
            f'--format aoti needs a C++ compiler, and there is no {" or ".join(compilers)}: '
            'install g++, or set CXX'
        )


def takes_any_size(args: argparse.Namespace) -> bool:
    # The pooling windows of heads depend on the size, and AOTInductor of torch 2.13 can't compare
    # the strides of channels-last maps with symbolic sizes.
    return args.part == 'backbone' and args.format != 'aoti'


def check_sizes(args: argparse.Namespace) -> None:
    args.size = height, width = tuple(args.size)
    if takes_any_size(args):
        others = (height * 3 // 4 + 1, width // 2 + 3), (height // 4 + 5, width + 31)
        smallest = SMALLEST
    elif args.check_size:
        raise ValueError(
            '--check-size is for backbones as onnx and pt2: a model has a head, whose pooling '
            'depends on the size, and AOTInductor compiles for one size, --size'
        )
    else:
        # other batch sizes, with images of the same size
        others = (args.size,) * 2
        smallest = 1
    if min(args.size) < smallest:
        raise ValueError(f'--size must be at least {smallest} pixels a side, got {args.size}')
    args.check_size = [tuple(size) for size in args.check_size or others]
    if min(map(min, args.check_size)) < 1:
        raise ValueError(f'--check-size must be two positive numbers, got {args.check_size}')


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
    subject = select(model, args.part, args.size, args.check_size, takes_any_size(args))
    print(describe_input(cfg))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, args.out.name)
        write(args.format, subject, file)
        try:
            verify(args.format, subject, file)
        except ValueError as error:
            raise ValueError(f'{args.out} is not written: {error}') from error
        write_atomically(args.out, file.read_bytes())
    size = 'any size' if takes_any_size(args) else '{} x {} pixels'.format(*args.size)
    print(f'{args.out}: {", ".join(subject.outputs)} of images of {size}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
