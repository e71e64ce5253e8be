"""Exports backbones and segmentors to files that run without the code of this project.

`verify` runs an exported file and compares its outputs with those of the module.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch.export import Dim, ExportedProgram

# Largest error that is accepted, relative to the largest value of an output.
TOLERANCE = 1e-4
# Batch sizes: the first is traced; all are used in turn when the file is checked.
BATCHES = (2, 1, 3)
# Runs in a process of its own, which imports torch and nothing of this project.
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


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Args:
        module: From images (B, C, H, W) to a tuple of tensors, in eval mode on the CPU.
        outputs: Names of these tensors.
        axes: Names, by index, of the axes of the images that may have any length.
        shapes: Shapes of images. The first is traced; all are used to check the file.
    """

    module: nn.Module
    outputs: list[str]
    axes: dict[int, str]
    shapes: Sequence[tuple[int, ...]]


class WholeImage(nn.Module):
    """Logits of a segmentor: images (B, C, H, W) of one size -> (B, classes, H, W)."""

    def __init__(self, segmentor: BaseModel, size: tuple[int, int]) -> None:
        super().__init__()
        self.segmentor: BaseModel = segmentor
        self.size = size

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.segmentor.encode_decode(images, [dict(img_shape=self.size)]),)


def select(
    model: BaseModel,
    part: str,
    size: tuple[int, int],
    others: Sequence[tuple[int, int]],
    dynamic: bool,
) -> Subject:
    """Select the part of a model to export.

    Args:
        model: A detector or segmentor with a backbone of saga_mm, in eval mode on the CPU.
        part: 'backbone', or 'model' for a segmentor.
        size: Height and width of the images to trace with.
        others: Further sizes to check with.
        dynamic: Whether images of any size are accepted, or only those of `size`.

    Raises:
        ValueError: `part` is 'model', and the model is not a segmentor.
    """
    backbone = model.backbone
    shapes = [
        (batch, backbone.input_channels, *size)
        for batch, size in zip(cycle(BATCHES), [size, *others])
    ]
    axes = {0: 'batch', 2: 'height', 3: 'width'} if dynamic else {0: 'batch'}
    if part == 'backbone':
        return Subject(backbone, [f'stage_{i}' for i in backbone.out_indices], axes, shapes)
    if not hasattr(model, 'encode_decode'):
        raise ValueError(
            f'--part model is for segmentors, got a {type(model).__name__}: of other models, the '
            'backbone can be exported'
        )
    return Subject(WholeImage(model, size), ['logits'], axes, shapes)


def describe_input(cfg: Config) -> str:
    """Describe how images have to be normalised for the exported program."""
    data = cfg.model.get('data_preprocessor') or Config()
    if data.get('rgb_to_bgr') or data.get('mean') is None:
        return 'images: float32, normalised as the data_preprocessor of the config does it'
    order = 'RGB' if data.get('bgr_to_rgb') else 'BGR'
    return f'images: float32, {order}, (pixel - {list(data.mean)}) / {list(data.std)}'


def trace(subject: Subject) -> ExportedProgram:
    return torch.export.export(
        subject.module,
        (torch.zeros(subject.shapes[0]),),
        dynamic_shapes=(dict.fromkeys(subject.axes, Dim.DYNAMIC),),
    )


def write(kind: str, subject: Subject, file: Path) -> None:
    """Export to a file of one of `FORMATS`."""
    program = trace(subject)
    if kind == 'onnx':
        # it warns each time that torchvision is not installed
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=['images'],
            output_names=subject.outputs,
            dynamic_shapes=(subject.axes,),
            verbose=False,
        )
        assert exported is not None
        exported.save(file)
    elif kind == 'aoti':
        aoti_compile_and_package(program, package_path=str(file))
    else:
        torch.export.save(program, file)


def run_onnx(file: Path, batches: list[Tensor]) -> list[list[Tensor]]:
    """Compute the outputs for each batch of images with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return [
        [torch.from_numpy(output) for output in session.run(None, {'images': images.numpy()})]
        for images in batches
    ]


def run_alone(kind: str, file: Path, batches: list[Tensor]) -> list[list[Tensor]]:
    """Compute the outputs for each batch of images in a process without this project's code."""
    images, outputs = file.with_name('images'), file.with_name('outputs')
    torch.save(batches, images)
    command = [sys.executable, '-W', 'ignore', '-c', RUN_ALONE, kind, *(file, images, outputs)]
    # in the folder of the file, which holds no package that could be imported
    done = subprocess.run(
        list(map(str, command)), cwd=file.parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or f'exit status {done.returncode}').splitlines()[-1]
        raise ValueError(f'it fails without the code of this project: {reason}')
    return torch.load(outputs)


def largest_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over all outputs; NaN if there is one.

    The error of an output is relative to the largest absolute value of the expected one.
    """
    errors = []
    for output, truth in zip(outputs, expected, strict=True):
        if output.shape != truth.shape:
            raise ValueError(f'an output has shape {tuple(output.shape)}, not {tuple(truth.shape)}')
        scale = truth.abs().max().clamp(min=torch.finfo(truth.dtype).tiny)
        errors.append((output - truth).abs().max() / scale)
    return torch.stack(errors).max().item()


def verify(kind: str, subject: Subject, file: Path) -> None:
    """Compare the outputs of a file with those of its subject; ValueError if they differ."""
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
