"""Convolutions on channels-last maps. Legend: B batch, H height, W width, C channels."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from saga_kernels.slices import cut, with_halo

from .mask import masked


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` on maps (B, H, W, C): same weights, and no copy between layouts."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv2d(Conv2d):
    """One filter of odd size per channel, stride 1: (B, H, W, C) -> the same."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        if kernel_size % 2 != 1:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.halo = kernel_size // 2

    def strips(self, x: Tensor, mask: Tensor | None, strips: Sequence[slice]) -> Iterable[Tensor]:
        """The output for `masked` maps in strips of rows, without grad one after the other."""
        if len(strips) == 1 or torch.is_grad_enabled():
            return cut(self(masked(x, mask)), strips)
        return (
            with_halo(lambda x, mask: self(masked(x, mask)), x, mask, strip, self.halo)
            for strip in strips
        )
