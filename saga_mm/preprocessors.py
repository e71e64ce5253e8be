"""Data preprocessors of mmdet and mmseg that add the mask for a backbone with `pad_mask=True`.

The registry holds functions that import the toolbox when they are called and return an instance of
a subclass of its preprocessor. The classes are attributes of this module that are created on first
access, so that pickle finds them in every process.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from .registry import MODELS

# The names of the classes, with the module and the name of each base class.
BASES = dict(
    MaskedDetDataPreprocessor=('mmdet.models', 'DetDataPreprocessor'),
    MaskedSegDataPreProcessor=('mmseg.models', 'SegDataPreProcessor'),
)


@MODELS.register_module(name='MaskedDetDataPreprocessor')
def masked_det_data_preprocessor(**kwargs: Any) -> BaseDataPreprocessor:
    """mmdet's DetDataPreprocessor, with a mask of the padding as the last channel.

    Args:
        **kwargs: Options of mmdet's DetDataPreprocessor. Its `pad_mask` has another meaning: it
            pads the masks of instances.

    Returns:
        mmdet.models.DetDataPreprocessor: Its `inputs` are (B, 4, H, W): three image channels, and a
        mask that is 1 inside each image and 0 in its padding. The mask is made after batch
        augmentations.
    """
    return _masked('MaskedDetDataPreprocessor')(**kwargs)


@MODELS.register_module(name='MaskedSegDataPreprocessor')
def masked_seg_data_preprocessor(**kwargs: Any) -> BaseDataPreprocessor:
    """mmseg's SegDataPreProcessor, with a mask of the padding as the last channel.

    Args:
        **kwargs: Options of mmseg's SegDataPreProcessor.

    Returns:
        mmseg.models.SegDataPreProcessor: Its `inputs` are (B, 4, H, W): three image channels, and a
        mask that is 1 inside each image and 0 in its padding.
    """
    return _masked('MaskedSegDataPreProcessor')(**kwargs)


class PadMaskMixin(nn.Module):
    """Adds the mask to the batch that a preprocessor, the next base class, makes.

    The size of an image is `img_shape` of its data sample, or that of its tensor if it has no data
    sample. The image is at the top left, where all of OpenMMLab's preprocessors place it.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        sizes = [image.shape[-2:] for image in data['inputs']]
        data = super().forward(data, training)
        if data['data_samples'] is not None:
            # A batch augmentation may have resized the images.
            sizes = [
                sample.get('img_shape', size)
                for sample, size in zip(data['data_samples'], sizes, strict=True)
            ]
        return {**data, 'inputs': add_mask(data['inputs'], sizes)}


def add_mask(images: Tensor, sizes: list[tuple[int, ...]]) -> Tensor:
    """Append a mask to images, (B, C, H, W) -> (B, C + 1, H, W); sizes are (height, width, ...)."""
    mask = images.new_zeros(len(images), 1, *images.shape[2:])
    for inside, (height, width, *_) in zip(mask, sizes, strict=True):
        inside[:, :height, :width] = 1
    return torch.cat([images, mask], dim=1)


@cache
def _masked(name: str) -> type[BaseDataPreprocessor]:
    module, base = BASES[name]
    return type(
        name, (PadMaskMixin, getattr(import_module(module), base)), {'__module__': __name__}
    )


def __getattr__(name: str) -> type[BaseDataPreprocessor]:
    if name in BASES:
        return _masked(name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
