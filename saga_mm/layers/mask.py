"""Masks that tell the tokens of an image from those of the padding of its batch.

Legend: B batch, H height, W width, C channels. A mask is (B, H, W, 1) bool, True inside an image.
None means that there is no padding, and costs nothing.
"""

import torch
from torch import Tensor


def mask_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The map (B, H, W, C) with zeros in the padding, whatever values it has there, including NaN.

    Every convolution gets its input in this form, because it also reads zeros beyond the border of
    an image that is not padded.
    """
    return x if mask is None else x.masked_fill(~mask, 0)


def downsample_mask(mask: Tensor | None, stride: int) -> Tensor | None:
    """The mask of a map with a stride, on which an image of h rows has ceil(h / stride) rows."""
    if mask is None:
        return None
    # An index in place of a slice, because for a slice torch.export would record whether a side is
    # a multiple of the stride.
    rows, columns = (torch.arange(0, side, stride, device=mask.device) for side in mask.shape[1:3])
    return mask[:, rows[:, None], columns]
