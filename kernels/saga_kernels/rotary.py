"""Rotary position encoding of the tokens of an image, arXiv 2104.09864 in two dimensions.

Legend: N = height * width tokens in row-major order, D head dim.
"""

import torch
from torch import Tensor

from .precision import compute_dtype


def apply_rotary_2d(x: Tensor, size: tuple[int, int], frequencies: Tensor) -> Tensor:
    """Turn pairs of channels by angles that grow with the position of their token.

    Channels 2i and 2i + 1 are the pair i. With f the frequencies, pair i turns by
    `row * f[i]` in the first half of the pairs, and by `column * f[i - D / 4]` in the second.

    Args:
        x: (B, N, ..., D), D a multiple of 4.
        size: (height, width) of the image in tokens.
        frequencies: (D / 4,) radians per row or column.

    Returns:
        (B, N, ..., D) in the dtype of x; angles and products are float32 or better.
    """
    cos, sin = rotation_table(size, frequencies.to(compute_dtype(x)))
    between = (1,) * (x.ndim - 3)
    cos, sin = (table.unflatten(0, (-1, *between)) for table in (cos, sin))
    return rotate_pairs(x, cos, sin).to(x.dtype)


def rotation_table(size: tuple[int, int], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, D / 2) of the angle of each token and pair of channels."""
    rows, columns = (
        torch.arange(length, dtype=frequencies.dtype, device=frequencies.device) for length in size
    )
    # (height, 1, D / 4) and (width, D / 4) -> (N, D / 2)
    angles = rows[:, None, None] * frequencies, columns[:, None] * frequencies
    table = torch.cat(torch.broadcast_tensors(*angles), -1).flatten(0, 1)
    return table.cos(), table.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of (..., D), by tables that broadcast to (..., D / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
