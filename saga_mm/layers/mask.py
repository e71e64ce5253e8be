"""Which cells of a map belong to an image, and which to the padding of its batch.

Legend: B batch, H height, W width, C channels. A mask is (B, H, W, 1) bool, True inside an image.
None stands for maps without padding, and costs nothing.
"""

import torch
from torch import Tensor


def mask_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """The map (B, H, W, C) with zeros in the padding, whatever stands there, NaN too.

    A convolution gets its input so, since it finds zeros beyond the border of an image that is
    alone.
    """
    return x if mask is None else x.masked_fill(~mask, 0)


def downsample_mask(mask: Tensor | None, stride: int) -> Tensor | None:
    """The mask of a coarser map, on which an image of h rows has ceil(h / stride) of them."""
    if mask is None:
        return None
    # An index, not a slice: torch.export would fix whether a side is a multiple of the stride.
    rows, columns = (torch.arange(0, side, stride, device=mask.device) for side in mask.shape[1:3])
    return mask[:, rows[:, None], columns]
