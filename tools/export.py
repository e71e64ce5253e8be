"""Export a backbone or a segmentor to a file that runs without the code of this project.

    python tools/export.py CONFIG --checkpoint FILE --out backbone.onnx
    python tools/export.py CONFIG --checkpoint FILE --format aoti --out backbone.pt2
    python tools/export.py CONFIG --checkpoint FILE --part model --size 512 512 --out upernet.onnx

A backbone takes normalised images (B, C, H, W) of any number and size, for aoti of one size, and
gives its maps. A segmentor takes images of one size, and gives the logits (B, classes, H, W) of the
whole image, resized to it as predictions are.

The formats: ONNX; aoti, the program compiled for this kind of CPU by AOTInductor, which Python and
C++ load; pt2, the program that torch.export makes. What is exported is the reference
implementation, in float32.

No file is written unless what it computes is that of the model, at the traced size and, where it
takes any, at others.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor
from torch.export import Dim, ExportedProgram

from saga_mm.apis import backbone_of, build_model, load_complete_weights
from saga_mm.checkpoint import make_folder, use_safe_loading, write_atomically
from saga_mm.cli import add_options, load_config, run_tool

# Largest error that a file may have, in parts of the largest value of an output.
TOLERANCE = 1e-4
# An axis of length one is fixed for good by torch.export: the last map, of stride 32, needs two.
SMALLEST = 64
# Numbers of images: traced, then checked in turn with the sizes.
BATCHES = (2, 1, 3)
SUFFIXES = dict(onnx='.onnx', aoti='.pt2', pt2='.pt2')
ONNX = ('onnx', 'onnxruntime', 'onnxscript')
# Run by a Python of its own: what loads the file knows torch, and nothing of this project.
RUN_ALONE = """
import sys, torch
from torch._inductor import aoti_load_package
kind, file, images, outputs = sys.argv[1:]
program = aoti_load_package(file) if kind == 'aoti' else torch.export.load(file).module()
with torch.no_grad():
    torch.save([list(program(x)) for x in torch.load(images)], outputs)
ours = {name for name in sys.modules if name.startswith('saga_')}
assert not ours, ours
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument(
        '--checkpoint',
        help='weights of the model. Defaults to those that init_cfg of the backbone names, or '
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
        help='of the images: the only one, or the one to trace at where any will do. Defaults to '
        '512 512',
    )
    parser.add_argument(
        '--check-size',
        nargs=2,
        type=int,
        action='append',
        metavar=('H', 'W'),
        help='of images to check besides where any size will do, may be given more than once. '
        'Defaults to two odd sizes below and around --size',
    )
    add_options(parser)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Fill in the sizes to check; ValueError for what can't be exported, or not written there."""
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
    # Heads pool with windows that depend on the size, and AOTInductor of torch 2.13 fails to
    # compare the strides of channels-last maps whose sizes are symbols.
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
        # other batches of the same size
        others = (args.size,) * 2
        smallest = 1
    if min(args.size) < smallest:
        raise ValueError(f'--size must be at least {smallest} pixels a side, got {args.size}')
    args.check_size = [tuple(size) for size in args.check_size or others]
    if min(map(min, args.check_size)) < 1:
        raise ValueError(f'--check-size must be two positive numbers, got {args.check_size}')


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Args:
        module: From images (B, C, H, W) to a tuple of tensors, in eval mode on the CPU.
        outputs: Names of these tensors.
        axes: Names of the axes of the images that may have any length.
        shapes: Of the images that it is traced with, and then of others to check it with.
    """

    module: nn.Module
    outputs: list[str]
    axes: dict[int, str]
    shapes: list[tuple[int, ...]]


class WholeImage(nn.Module):
    """Logits of a segmentor: images (B, C, H, W) of one size -> (B, classes, H, W)."""

    def __init__(self, segmentor: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.segmentor = segmentor
        self.size = size

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.segmentor.encode_decode(images, [dict(img_shape=self.size)]),)


def build(cfg: Config, checkpoint: str | None) -> nn.Module:
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


def select(model: nn.Module, args: argparse.Namespace) -> Subject:
    """The part of a model that is to be exported."""
    backbone = model.backbone
    shapes = [
        (batch, backbone.input_channels, *size)
        for batch, size in zip(cycle(BATCHES), [args.size, *args.check_size])
    ]
    axes = {0: 'batch', 2: 'height', 3: 'width'} if takes_any_size(args) else {0: 'batch'}
    if args.part == 'backbone':
        return Subject(backbone, [f'stage_{i}' for i in backbone.out_indices], axes, shapes)
    if not hasattr(model, 'encode_decode'):
        raise ValueError(
            f'--part model is for segmentors, got a {type(model).__name__}: of other models, the '
            'backbone can be exported'
        )
    return Subject(WholeImage(model, args.size), ['logits'], axes, shapes)


def describe_input(cfg: Config) -> str:
    """How images are to be normalised before they come to the exported program."""
    data = cfg.model.get('data_preprocessor') or {}
    if data.get('rgb_to_bgr') or data.get('mean') is None:
        return 'images: float32, normalised as data_preprocessor of the config does'
    order = 'RGB' if data.get('bgr_to_rgb') else 'BGR'
    return f'images: float32, {order}, (pixel - {list(data.mean)}) / {list(data.std)}'


def trace(subject: Subject) -> ExportedProgram:
    return torch.export.export(
        subject.module,
        (torch.zeros(subject.shapes[0]),),
        dynamic_shapes=(dict.fromkeys(subject.axes, Dim.DYNAMIC),),
    )


def write(kind: str, subject: Subject, file: Path) -> None:
    """Export to a file of one of `SUFFIXES`."""
    program = trace(subject)
    if kind == 'onnx':
        # each time, it tells that torchvision is not there
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=['images'],
            output_names=subject.outputs,
            dynamic_shapes=(subject.axes,),
            verbose=False,
        )
        exported.save(file)
    elif kind == 'aoti':
        aoti_compile_and_package(program, package_path=str(file))
    else:
        torch.export.save(program, file)


def run_onnx(file: Path, batches: list[Tensor]) -> list[list[Tensor]]:
    """What onnxruntime computes from each batch of images."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return [
        [torch.from_numpy(output) for output in session.run(None, {'images': images.numpy()})]
        for images in batches
    ]


def run_alone(kind: str, file: Path, batches: list[Tensor]) -> list[list[Tensor]]:
    """What a Python without the code of this project computes from each batch of images."""
    images, outputs = file.with_name('images'), file.with_name('outputs')
    torch.save(batches, images)
    command = [sys.executable, '-W', 'ignore', '-c', RUN_ALONE, kind, *(file, images, outputs)]
    # in the folder of the file, where nothing else lies
    done = subprocess.run(
        list(map(str, command)), cwd=file.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f'exit status {done.returncode}').splitlines()[-1]
        raise ValueError(f'it fails without the code of this project: {reason}')
    return torch.load(outputs)


def largest_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Error of the worst output, in parts of that output's largest value; NaN if there is one."""
    errors = []
    for output, truth in zip(outputs, expected, strict=True):
        if output.shape != truth.shape:
            raise ValueError(f'an output has shape {tuple(output.shape)}, not {tuple(truth.shape)}')
        scale = truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny)
        errors.append((output - truth).abs().max() / scale)
    return torch.stack(errors).max().item()


def verify(kind: str, subject: Subject, file: Path) -> None:
    """Compare what a file computes with what its subject does; ValueError if they differ."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(shape, generator=generator) for shape in subject.shapes]
    found = run_onnx(file, batches) if kind == 'onnx' else run_alone(kind, file, batches)
    for images, outputs in zip(batches, found, strict=True):
        error = largest_error(outputs, subject.module(images))
        shape = ' x '.join(map(str, images.shape))
        if not error <= TOLERANCE:
            raise ValueError(
                f'for images of {shape}, it is off by {error:.1e} of the largest value of an '
                f'output, more than {TOLERANCE:.0e}'
            )
        print(f'{shape}: off by {error:.1e} of the largest value')


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    check(args)
    use_safe_loading()
    cfg = load_config(args.config, args.cfg_options, ('model',))
    make_folder(args.out.parent)
    subject = select(build(cfg, args.checkpoint), args)
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
