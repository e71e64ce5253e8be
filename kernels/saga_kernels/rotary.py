"""Rotary position encoding of the tokens of an image, arXiv 2104.09864 in two dimensions.

Legend: N = height * width tokens in row-major order, D head dim.
"""

import torch
from torch import Tensor

from .precision import compute_dtype
from .tracing import is_tracing_or_exporting

# Digits of positions in exported graphs: enough for 262,144 rows or columns.
BASE, DIGITS = 64, 3


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
    # (length, D / 4) each
    (row_cos, row_sin), (column_cos, column_sin) = (_turns(n, frequencies) for n in size)

    def table(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cat(torch.broadcast_tensors(rows[:, None], columns), -1).flatten(0, 1)

    return table(row_cos, column_cos), table(row_sin, column_sin)


def _turns(length: int, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, D / 4) of the angles of positions 0, 1, ... along one axis."""
    positions = torch.arange(length, device=frequencies.device)
    if not is_tracing_or_exporting():
        angles = positions[:, None] * frequencies
        return angles.cos(), angles.sin()
    # A graph that runs in float16 can't hold the angle of a distant position. Tables of its digits
    # do not depend on the image: they are constants, which are computed before, in float32.
    digits = torch.arange(BASE, device=frequencies.device)[:, None] * frequencies
    cos, sin = digits.cos()[positions % BASE], digits.sin()[positions % BASE]
    for power in range(1, DIGITS):
        angles = digits * BASE**power
        digit = positions // BASE**power % BASE
        other_cos, other_sin = angles.cos()[digit], angles.sin()[digit]
        cos, sin = cos * other_cos - sin * other_sin, sin * other_cos + cos * other_sin
    return cos, sin


def table_shape(tokens: int, width: int, dim: int) -> tuple[int, int, int]:
    """Shape of the table that the kernels read: for each column of the image, and then for each
    row, D / 4 cosines and as many sines."""
    return width + tokens // max(width, 1), 2, dim // 4


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbouring channels of (..., D), by tables that broadcast to (..., D / 2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
