"""Means over tokens, in steps that float16 can hold: for graphs that are exported.

A runtime may execute an exported graph in float16 throughout, whatever it says of float32. There a
sum over the tokens of a large image overflows (beyond 65504), or no longer changes by what is added
to it (11 bits). Means of chunks of tokens, of groups of chunks, and of all groups do neither.

Legend: B batch, N tokens, H heads, C chunks of LENGTH tokens each.
"""

import torch.nn.functional as F
from torch import Tensor

from .chunks import ceil_div
from .tracing import is_exporting

# Tokens of a chunk, and chunks of a group. 2048 pixels at stride 4 are 256 groups.
LENGTH = 128
GROUP = 8


def split_up(x: Tensor, axis: int, length: int, value: float = 0.0) -> Tensor:
    """Split an axis of any size into parts of a length, the last one filled up with a value.

    Two axes take its place. There is one part more than needed under `torch.export`, which fixes an
    axis of length one for good.
    """
    size = x.shape[axis]
    parts = ceil_div(size, length) + int(is_exporting())
    fill = [0] * (2 * (x.ndim - 1 - axis)) + [0, parts * length - size]
    # Not by unflatten: the TorchScript exporter to ONNX would fix the shape.
    shape = *x.shape[:axis], parts, length, *x.shape[axis + 1 :]
    return F.pad(x, fill, value=value).reshape(shape)


def mean_of_chunks(x: Tensor) -> Tensor:
    """(B, H, C, ...) -> (B, H, ...), and zero chunks to fill up the groups count as well."""
    return split_up(x, 2, GROUP).mean(3).mean(2)


def tokens_of_groups(x: Tensor) -> int:
    """Number of tokens that `mean_of_chunks` of x (B, H, C, ...) is a mean of."""
    groups = ceil_div(x.shape[2], GROUP) + int(is_exporting())
    return groups * GROUP * LENGTH


def positive_or_one(x: Tensor) -> Tensor:
    """x where it is positive, else 1: what a non-negative quantity can be divided by."""
    return x.where(x > 0, 1)
