"""Rotary position encoding in two dimensions, arXiv 2104.09864, as RAVLT (arXiv 2411.07635) has it.

Legend: N = height * width tokens in row-major order, D head dim.
"""

import torch
from torch import Tensor


def rotary_frequencies(dim: int, device: torch.device | str | None = None) -> Tensor:
    """(D / 4,) float32: radians per row or column, from 1 down to 1 / 10000, both included."""
    return 1 / 10000 ** torch.linspace(0, 1, dim // 4, dtype=torch.float32, device=device)


def rotate(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Turn pairs of channels by angles that grow with the position of their token.

    Channels 2i and 2i + 1 are the pair i: the first D / 4 pairs turn with the row, the others with
    the column. Angles and products are float32 or better.

    Args:
        x: (B, N, ..., D), D a multiple of 4.
        size: Height and width of the map.

    Returns:
        (B, N, ..., D), in the dtype of x.
    """
    height, width = size
    dim = x.shape[-1]
    frequencies = rotary_frequencies(dim, x.device)
    if x.dtype == torch.float64:
        frequencies = frequencies.double()
    rows, columns = (torch.arange(length, device=x.device)[:, None] for length in size)
    parts = (height, width, dim // 4)
    angles = torch.cat(
        [(rows * frequencies)[:, None].expand(parts), (columns * frequencies).expand(parts)], dim=-1
    )
    # (N, 1, ..., 1, D / 2)
    angles = angles.reshape(height * width, *(1,) * (x.ndim - 3), dim // 2)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)
