"""Measures what inference of a whole detector, segmentor or classifier on one image costs.

The model predicts as it does for users, except for steps that depend on values and have no weights,
such as choosing boxes and merging masks. They are replaced by stand-ins, so that the model can be
run on fake tensors, which have shapes and no values, and so that all models find the same number of
objects.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import cv2
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from ..apis import toolbox_of
from ..cli.errors import text_of
from .cost import Cost, measure_cost

# Number of regions that the first stage of a detector passes to the second, and number of objects
# that a detector finds. They are those of mmdet's tables.
REGIONS, OBJECTS = 1000, 100
# What a model may raise if it can't be run on fake tensors, or with stand-ins.
CAN_NOT_RUN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    cv2.error,
)


def model_cost(model: BaseModel, size: tuple[int, int], channels: int = 3) -> dict[str, Cost]:
    """Measure the cost of inference on one image of every module, by its name; '' is the model.

    A model that can't be run on fake tensors is run on random pixels, and activations are not
    counted.

    Args:
        model: A detector of mmdet, a segmentor of mmseg or a classifier of mmpretrain, in eval mode
            on the CPU.
        size: Height and width of the image, in pixels.
        channels: Number of channels of the image, including a mask of the padding. Defaults to 3.

    Raises:
        ValueError: The model is none of these, or it can't be run on an image of this size.
    """
    toolbox_of(model)
    shape = (1, channels, *size)
    shapes_only = FakeTensorMode()
    with FakeCopyMode(shapes_only):
        shapes = copy.deepcopy(model)
    attempts: tuple[Callable[[], dict[str, Cost]], ...] = (
        lambda: _measure(shapes, shape, shapes_only, stand_ins(shapes)),
        lambda: _measure(model, shape, nullcontext(), stand_ins(model)),
        lambda: _measure(model, shape, nullcontext(), nullcontext()),
    )
    for attempt in attempts:
        try:
            return attempt()
        except CAN_NOT_RUN as error:
            reason = error
    text = ' '.join(f'{type(reason).__name__}: {text_of(reason)}'.split())
    raise ValueError(
        f'{type(model).__name__} can not be run on an image of {size[0]} x {size[1]} pixels (some '
        f'models take images of one size only): {text}'
    ) from reason


def _measure(
    model: BaseModel,
    shape: tuple[int, ...],
    mode: AbstractContextManager,
    choices: AbstractContextManager,
) -> dict[str, Cost]:
    with mode, choices:
        torch.manual_seed(0)
        image = torch.randn(shape)
        # without activations, which would fill the memory if the tensors are real
        grad = isinstance(mode, FakeTensorMode)
        return measure_cost(model, lambda: predict(model, image), grad)


def not_counted(model: nn.Module, costs: dict[str, Cost]) -> dict[str, str]:
    """Find the parts with parameters whose FLOPs are not in the costs; return the reason for each.

    Args:
        model: A model.
        costs: The result of `model_cost`.
    """

    def visit(module: nn.Module, name: str, product_above: bool) -> Iterator[tuple[str, str]]:
        cost = costs[name]
        names = {f'{name}.{child}'.lstrip('.'): part for child, part in module.named_children()}
        # a module that several others share has one name
        children = {child: part for child, part in names.items() if child in costs}
        own = cost.flops - sum(costs[child].flops for child in children)
        if cost.parameters and cost.unused == cost.parameters:
            yield name, 'inference does without it'
        # a module above may use the weight of this one in a product of its own
        elif _has_matrix(module) and not cost.flops and not product_above:
            yield name, 'it has no product that the counter knows'
        else:
            for child, part in children.items():
                yield from visit(part, child, product_above or own > 0)

    return dict(visit(model, '', False))


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, 'weight', None)
    embeds = isinstance(module, nn.Embedding)
    return isinstance(weight, Tensor) and weight.ndim > 1 and not embeds


def predict(model: BaseModel, image: Tensor) -> object:
    """Run all of the prediction for an image (1, C, H, W) that has weights."""
    size = tuple(image.shape[2:])
    info = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
        img_path='',
    )
    toolbox = toolbox_of(model)
    if toolbox == 'mmseg':
        return model.encode_decode(image, [info])
    if toolbox == 'mmpretrain':
        return model(image, mode='tensor')
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=info)
    if hasattr(model, 'roi_head') and not hasattr(model, 'rpn_head'):
        # Fast R-CNN expects regions in its input
        sample.proposals = objects(REGIONS)
    return model.predict(image, [sample])


def objects(number: int) -> InstanceData:
    """Regions or objects with arbitrary values."""
    return InstanceData(
        bboxes=torch.tensor([0.0, 0.0, 64.0, 64.0]).repeat(number, 1),
        labels=torch.zeros(number, dtype=torch.long),
        scores=torch.ones(number),
    )


@contextmanager
def stand_ins(model: BaseModel) -> Iterator[None]:
    """Context in which a detector proposes `REGIONS` regions and finds `OBJECTS` objects.

    Operations of mmcv that can't take fake tensors are replaced by others with the same shapes and
    FLOPs.
    """
    first_stage = set(getattr(model, 'rpn_head', nn.Identity()).modules())
    with ExitStack() as stack:

        def replace(owner: nn.Module, name: str, function: Callable) -> None:
            stack.enter_context(patch.object(owner, name, function))

        for module in model.modules():
            if hasattr(module, 'predict_by_feat'):
                number = REGIONS if module in first_stage else OBJECTS
                replace(module, 'predict_by_feat', _chooser(number))
            for kind in type(module).__mro__:
                if function := STAND_INS.get(kind.__name__):
                    replace(module, *function(module))
                    break
        if hasattr(model, 'add_pred_to_datasample'):
            replace(model, 'add_pred_to_datasample', lambda samples, *args: (samples, *args))
        yield


def _chooser(number: int) -> Callable[..., list[InstanceData]]:
    """Make a stand-in for choosing objects; mask heads return the objects that they are given."""

    def choose(*args: object, results_list: list | None = None, **kwargs: object) -> list:
        return results_list or [objects(number)]

    return choose


def _roi_extractor(module: Any) -> tuple[str, Callable]:
    def forward(maps: tuple[Tensor, ...], regions: Tensor, *args: object, **kw: object) -> Tensor:
        size = module.roi_layers[0].output_size
        return maps[0].new_zeros(len(regions), module.out_channels, *size)

    return 'forward', forward


def _roi_layer(module: Any) -> tuple[str, Callable]:
    def forward(x: Tensor, regions: Tensor, *args: object) -> Tensor:
        return x.new_zeros(len(regions), x.shape[1], *module.output_size)

    return 'forward', forward


def _deformable(module: Any) -> tuple[str, Callable]:
    """An ordinary convolution, which has the same products, after the one that makes offsets."""

    def forward(x: Tensor, *args: object) -> Tensor:
        if hasattr(module, 'conv_offset'):
            module.conv_offset(x)
        bias = getattr(module, 'bias', None)
        shape = (module.stride, module.padding, module.dilation, module.groups)
        return F.conv2d(x, module.weight, bias if isinstance(bias, Tensor) else None, *shape)

    return 'forward', forward


def _masked_convolution(module: Any) -> tuple[str, Callable]:
    """A convolution at all positions, which is the upper limit."""
    return 'forward', lambda x, mask=None: nn.Conv2d.forward(module, x)


def _carafe(module: Any) -> tuple[str, Callable]:
    def reassemble(x: Tensor, mask: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:2], *mask.shape[2:])

    return 'feature_reassemble', reassemble


def _psa_mask(module: Any) -> tuple[str, Callable]:
    def forward(x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return x.new_zeros(len(x), height * width, height, width)

    return 'forward', forward


def _fusion_head(module: Any) -> tuple[str, Callable]:
    return 'predict', lambda *args, **kwargs: []


# Functions that return the attribute of a module to replace and its stand-in, by the name of the
# class of the module or of one of its bases.
STAND_INS: dict[str, Callable[[Any], tuple[str, Callable]]] = dict(
    SingleRoIExtractor=_roi_extractor,
    RoIAlign=_roi_layer,
    RoIPool=_roi_layer,
    DeformConv2d=_deformable,
    ModulatedDeformConv2d=_deformable,
    MaskedConv2d=_masked_convolution,
    CARAFEPack=_carafe,
    PSAMask=_psa_mask,
    BasePanopticFusionHead=_fusion_head,
)
