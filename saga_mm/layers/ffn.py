"""Feed-forward network of a transformer block. Legend: B batch, H height, W width, C channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels.dispatch import Impl

from .conv import DepthwiseConv2d, add_conv
from .init import init_linear


class FFN(nn.Module):
    """Two linear layers with a GELU between them, on maps: (B, H, W, C) -> the same shape.

    Args:
        dim: C.
        hidden_dim: Channels between the two layers.
        conv_kernel_size: Kernel size of a depthwise convolution after the GELU, added to its input;
            0 for no convolution.

    Attributes:
        impl: `'auto'`, `'reference'` or `'triton'` for the whole second half of a block, where it
            can run as one kernel, see `saga_kernels.ffn`. 'auto' unless it is set.
    """

    impl: Impl = 'auto'

    def __init__(self, dim: int, hidden_dim: int, conv_kernel_size: int = 0) -> None:
        super().__init__()
        self.fc1 = init_linear(nn.Linear(dim, hidden_dim))
        self.dwconv = DepthwiseConv2d(hidden_dim, conv_kernel_size) if conv_kernel_size else None
        self.fc2 = init_linear(nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.gelu(self.fc1(x))
        if self.dwconv is not None:
            x = add_conv(x, self.dwconv, x, mask)
        return self.fc2(x)
