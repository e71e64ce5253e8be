"""Convolutions on channels-last maps. Legend: B batch, H height, W width, C channels."""

from torch import Tensor, nn

from saga_kernels import depthwise_conv2d
from saga_kernels.dispatch import Impl
from saga_kernels.tracing import is_tracing_or_exporting

from .mask import mask_padding
from .watch import is_watched


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
    """One filter of odd size per channel, with stride 1: (B, H, W, C) -> the same shape.

    Attributes:
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. 'auto' unless it
            is set.
    """

    impl: Impl = 'auto'

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        if kernel_size < 1 or kernel_size % 2 != 1:
            raise ValueError(f'kernel_size must be odd and positive, got {kernel_size}')
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias, impl=self.impl)


def add_conv(base: Tensor, conv: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """base + conv(x) without padding, as in `mask_padding`, in one pass over the maps on a GPU.

    A convolution that is watched or replaced is called.

    Args:
        base: (B, H, W, C), may be x.
        conv: Maps (B, H, W, C) to the same shape, such as a `DepthwiseConv2d`.
        x: (B, H, W, C).
        mask: As in `mask_padding`, or None.
    """
    if type(conv) is not DepthwiseConv2d or is_tracing_or_exporting() or is_watched(conv):
        return base + conv(mask_padding(x, mask))
    return depthwise_conv2d(x, conv.weight, conv.bias, add=base, mask=mask, impl=conv.impl)
