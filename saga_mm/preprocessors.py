"""Data preprocessors of mmdet and mmseg that tell a backbone with `pad_mask=True` what is padding.

Registered are functions: they import the toolbox when called and return a subclass of its own
preprocessor. The classes are attributes of this module, made when they are first asked for, so that
pickle finds them in every process.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor, nn

from .registry import MODELS

# names of the classes, and where their bases are
BASES = dict(
    MaskedDetDataPreprocessor=('mmdet.models', 'DetDataPreprocessor'),
    MaskedSegDataPreProcessor=('mmseg.models', 'SegDataPreProcessor'),
)


@MODELS.register_module(name='MaskedDetDataPreprocessor')
def masked_det_data_preprocessor(**kwargs) -> BaseDataPreprocessor:
    """mmdet's DetDataPreprocessor, with a mask of the padding as the last channel.

    Args:
        **kwargs: Go to mmdet's DetDataPreprocessor. Its `pad_mask` is another one: it pads the
            masks of instances.

    Returns:
        mmdet.models.DetDataPreprocessor: whose `inputs` are (B, 4, H, W): three image channels, and
        1 inside each image, 0 in its padding. Batch augmentations come before it.
    """
    return _masked('MaskedDetDataPreprocessor')(**kwargs)


@MODELS.register_module(name='MaskedSegDataPreprocessor')
def masked_seg_data_preprocessor(**kwargs) -> BaseDataPreprocessor:
    """mmseg's SegDataPreProcessor, with a mask of the padding as the last channel.

    Args:
        **kwargs: Go to mmseg's SegDataPreProcessor.

    Returns:
        mmseg.models.SegDataPreProcessor: whose `inputs` are (B, 4, H, W): three image channels, and
        1 inside each image, 0 in its padding.
    """
    return _masked('MaskedSegDataPreProcessor')(**kwargs)


class PadMaskMixin(nn.Module):
    """Adds the mask to what a preprocessor, the next class in line, makes of a batch.

    The size of an image is what its data sample says (`img_shape`), or else that of its tensor. It
    lies at the top left, as all of OpenMMLab's preprocessors put it.
    """

    def forward(self, data: dict, training: bool = False) -> dict:
        sizes = [image.shape[-2:] for image in data['inputs']]
        data = super().forward(data, training)
        if data['data_samples'] is not None:
            # a batch augmentation may have resized them
            sizes = [
                sample.get('img_shape', size)
                for sample, size in zip(data['data_samples'], sizes, strict=True)
            ]
        return {**data, 'inputs': add_mask(data['inputs'], sizes)}


def add_mask(images: Tensor, sizes: list[tuple[int, ...]]) -> Tensor:
    """Images (B, C, H, W) and a mask: (B, C + 1, H, W); sizes are (height, width, ...) of each."""
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
