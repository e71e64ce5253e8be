"""Convolutions on channels-last maps. Legend: B batch, H height, W width, C channels."""

from torch import Tensor, nn


def to_channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), the shape that convolutions expect.

    A contiguous map is not copied: its memory layout is channels-last, which convolutions keep.
    """
    return x.contiguous().permute(0, 3, 1, 2)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` for maps (B, H, W, C): same weights, and no copy of contiguous maps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(to_channels_first(x)).permute(0, 2, 3, 1)


class DepthwiseConv2d(Conv2d):
    """One filter of odd size per channel, with stride 1: (B, H, W, C) -> the same shape."""

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        if kernel_size % 2 != 1:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
