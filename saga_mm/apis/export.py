"""Exports backbones and segmentors to files that run without the code of this project.

`verify` runs an exported file and compares its outputs with those of the module.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package
from torch._inductor import config as inductor
from torch.export import Dim, ExportedProgram

from .predict import toolbox_of

# Packages that write and check an ONNX file.
ONNX = ('onnx', 'onnxruntime', 'onnxscript')
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
    """Logits of a segmentor: images (B, C, H, W) -> (B, classes, H, W)."""

    def __init__(self, segmentor: BaseModel) -> None:
        super().__init__()
        self.segmentor: BaseModel = with_upsampling_of_torch(segmentor)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        size = tuple(images.shape[2:])
        return (self.segmentor.encode_decode(images, [dict(img_shape=size)]),)


def with_upsampling_of_torch(model: BaseModel) -> BaseModel:
    """A copy of a model in which torch's modules replace mmseg's that scale a map by a factor.

    Those compute the new size by `int`, which makes it a constant of the export.
    """
    from mmseg.models.utils import Upsample

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, part in parent.named_children():
            if isinstance(part, Upsample) and not part.size:
                factor, mode, corners = part.scale_factor, part.mode, part.align_corners
                setattr(parent, name, nn.Upsample(None, factor, mode, corners))
    return model


class AllBoxes(nn.Module):
    """Boxes and scores of a detector with anchors, before non-maximum suppression.

    Images (B, C, H, W) -> boxes (B, N, 4) as x1, y1, x2, y2 in pixels of the image, inside it, and
    their scores (B, N, classes), for N anchors.
    """

    def __init__(self, detector: BaseModel) -> None:
        super().__init__()
        self.detector: BaseModel = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        head: Any = self.detector.bbox_head
        logits, deltas = head(self.detector.extract_feat(images))
        sizes = [tuple(part.shape[2:]) for part in logits]
        anchors = torch.cat(head.prior_generator.grid_priors(sizes, device=images.device))
        batch = images.shape[0]
        # One axis for all boxes, because mmdet's coder takes a batch on its way to ONNX only.
        boxes = head.bbox_coder.decode(
            anchors.repeat(batch, 1),
            self.by_anchor(deltas, 4).flatten(0, 1),
            max_shape=tuple(images.shape[2:]),
        ).unflatten(0, (batch, -1))
        classes = self.by_anchor(logits, head.cls_out_channels)
        return boxes, classes.sigmoid() if head.use_sigmoid_cls else classes.softmax(-1)[..., :-1]

    @staticmethod
    def by_anchor(maps: Sequence[Tensor], channels: int) -> Tensor:
        """Maps (B, anchors * channels, H, W) -> (B, N, channels)."""
        return torch.cat(
            [part.permute(0, 2, 3, 1).reshape(part.shape[0], -1, channels) for part in maps], dim=1
        )


def select(model: BaseModel, part: str) -> tuple[nn.Module, list[str]]:
    """Select the part of a model to export; return it and the names of its outputs.

    Args:
        model: A detector or segmentor with a backbone of saga_mm, in eval mode on the CPU.
        part: 'backbone', or 'model' for a segmentor or a detector with anchors of one stage.

    Raises:
        ValueError: `part` is 'model', and the model is another one.
    """
    if part == 'backbone':
        return model.backbone, [f'stage_{i}' for i in model.backbone.out_indices]
    if hasattr(model, 'encode_decode'):
        return WholeImage(model), ['logits']
    if has_anchors(model):
        return AllBoxes(model), ['boxes', 'scores']
    raise ValueError(
        '--part model is for segmentors, and for detectors of one stage with anchors and a score '
        f'for each class, got a {type(model).__name__}: of other models, the backbone can be '
        'exported'
    )


def has_anchors(model: BaseModel) -> bool:
    """Whether a detector is like RetinaNet: no second stage, anchors, and no further score."""
    if toolbox_of(model) != 'mmdet':
        return False
    from mmdet.models.dense_heads import AnchorHead
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    head: Any = getattr(model, 'bbox_head', None)
    return (
        isinstance(head, AnchorHead)
        and isinstance(head.bbox_coder, DeltaXYWHBBoxCoder)
        and not any(hasattr(head, name) for name in ('loss_centerness', 'loss_iou'))
    )


def takes_any_size(module: nn.Module) -> bool:
    """Whether the export of a module accepts images of any size.

    An export has no adaptive pooling, as in the head of UperNet, whose windows depend on the size.
    """
    return not any(
        isinstance(part, nn.AdaptiveAvgPool2d) and part.output_size not in (1, (1, 1))
        for part in module.modules()
    )


def check_format(kind: str) -> None:
    """ValueError if what writes a format, 'onnx', 'aoti' or 'pt2', is not installed."""
    if kind == 'onnx':
        missing = [name for name in ONNX if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"the format onnx needs {', '.join(missing)}: pip install 'saga_mm[export]'"
            )
    compilers = [name for name in inductor.cpp.cxx if name]
    if kind == 'aoti' and not any(map(shutil.which, compilers)):
        raise ValueError(
            f'the format aoti needs a C++ compiler, and there is no {" or ".join(compilers)}: '
            'install g++, or set CXX'
        )


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
