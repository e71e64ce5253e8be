"""Mixing of each token with a neighbour. Legend: B batch, H height, W width, C channels."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .mask import mask_padding


class QShift(nn.Module):
    """Mixes each token with its four neighbours, once for each of several linear layers.

    mix * x + (1 - mix) * shifted, with a learned factor per channel. A quarter of the channels of
    `shifted` comes from each of the neighbours at the left, at the right, above and below; up to
    three channels that remain are not shifted. A neighbour outside of the image is zero.

    Args:
        dim: C.
        parts: Number of mixtures. The factors of each start at (0, 1, ..., C - 1) / C.

    Source: arXiv 2403.02308 (Vision-RWKV), whose initial factors also depend on the depth.
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        # One axis, as in the other scales, to which no weight decay is applied.
        self.mix = nn.Parameter(torch.arange(dim).repeat(parts) / dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The mixtures of a map (B, H, W, C), each of its shape; mask as in `mask_padding`."""
        shifted = shift(mask_padding(x, mask))
        return tuple(shifted + (x - shifted) * mix for mix in self.mix.chunk(self.parts))

    def extra_repr(self) -> str:
        return f'parts={self.parts}'


def shift(x: Tensor) -> Tensor:
    """(B, H, W, C) -> the same shape: each quarter of the channels from one of four neighbours."""
    height, width, dim = x.shape[1:]
    quarter = dim // 4
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    # Row and column of the padded map that belong to the first token: the neighbours at the left,
    # at the right, above and below.
    corners = [(1, 0), (1, 2), (0, 1), (2, 1)]
    neighbours = [
        padded[:, row : row + height, column : column + width, i * quarter : (i + 1) * quarter]
        for i, (row, column) in enumerate(corners)
    ]
    return torch.cat([*neighbours, x[..., 4 * quarter :]], dim=-1)
