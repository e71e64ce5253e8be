"""The input of a segmentor, normalised and padded row by row as it is read."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..inference import ImageRows


def preprocess(model: BaseModel, data: Mapping) -> tuple[ImageRows, BaseDataElement]:
    """What the data preprocessor of a model makes of an image, and its data sample.

    mmseg's preprocessor and `MaskedSegDataPreprocessor` compute each pixel by itself, so they are
    applied to rows when these are read. With any other one, the input is there as a whole.

    Args:
        model: A segmentor of mmseg in eval mode.
        data: As in `segment_whole`.
    """
    inputs, sample = data['inputs'], data['data_samples']
    if not computes_pixels(model.data_preprocessor):
        batch = model.data_preprocessor(pseudo_collate([in_memory(data)]), False)
        return ImageRows.of(batch['inputs']), batch['data_samples'][0]
    device = model.data_preprocessor.device
    channels, height, width = inputs.shape
    bare = type(sample)(metainfo=sample.metainfo)
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty((channels, height, width), dtype=inputs.dtype)
        batch = model.data_preprocessor(dict(inputs=[image], data_samples=[bare]), False)
        _, channels, padded_height, padded_width = batch['inputs'].shape
    sample = sample.to(device)
    sample.set_metainfo(batch['data_samples'][0].metainfo)
    without_padding = copy.copy(model.data_preprocessor)
    without_padding.test_cfg = None

    def read(rows: range) -> Tensor:
        inside = inputs[:, rows.start : min(rows.stop, height)]
        part = without_padding(dict(inputs=[inside], data_samples=[bare]), False)['inputs']
        padding = (0, padded_width - width, 0, len(rows) - inside.shape[1])
        if not any(padding):
            return part
        # the mask is 0 in the padding
        image, mask = part.tensor_split([len(inputs)], dim=1)
        image = F.pad(image, padding, value=without_padding.pad_val)
        return torch.cat([image, F.pad(mask, padding)], 1)

    return ImageRows((1, padded_height, padded_width, channels), read), sample


def in_memory(data: Mapping) -> dict:
    """The result of a test pipeline, with the whole image as a tensor."""
    inputs = data['inputs']
    return dict(data, inputs=inputs if isinstance(inputs, Tensor) else inputs[:])


def computes_pixels(preprocessor: nn.Module) -> bool:
    """Whether a preprocessor does nothing but what mmseg's one does, and adds a mask."""
    from mmseg.models import SegDataPreProcessor

    from ..preprocessors import MaskedSegDataPreProcessor

    return type(preprocessor) in (SegDataPreProcessor, MaskedSegDataPreProcessor)
