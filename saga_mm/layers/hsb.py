"""Features of early stages for a later stage. Legend: B batch, H height, W width, C channels."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv import Conv2d
from .init import init_linear
from .mask import mask_padding


class HSB(nn.Module):
    """Adds maps of earlier stages, times a learned factor per channel, to the map of a later stage.

    A strided depthwise convolution brings each earlier map to the grid of the later one, and a
    linear layer brings it to its width. The factor starts at zero, so an untrained module returns
    the later map unchanged.

    Args:
        in_dims: C of each earlier map.
        dim: C of the later map.
        strides: Tokens of each earlier map, along one side, per token of the later one.

    Source: arXiv 2601.11164 has a module of this name for this purpose; its form here is the
    project's choice.
    """

    def __init__(self, in_dims: Sequence[int], dim: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.Sequential(
                # Overlapping windows: (H, W) -> (ceil(H / stride), ceil(W / stride)).
                Conv2d(in_dim, in_dim, 2 * stride - 1, stride, stride - 1, groups=in_dim),
                init_linear(nn.Linear(in_dim, dim)),
            )
            for in_dim, stride in zip(in_dims, strides, strict=True)
        )
        self.scale = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, earlier: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Add the most recent earlier maps, one per path, to x.

        Args:
            x: (B, H, W, C).
            earlier: Maps (B, stride * H, stride * W, C_in), up to stride - 1 rows or columns
                smaller, each with its mask as in `mask_padding`.
        """
        latest = earlier[-len(self.paths) :]
        maps = [
            path(mask_padding(y, mask)) for path, (y, mask) in zip(self.paths, latest, strict=True)
        ]
        return x + self.scale * sum(maps[1:], maps[0])
