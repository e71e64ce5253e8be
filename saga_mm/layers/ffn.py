"""Feed-forward network of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels.slices import cut, join, row_strips, with_halo

from .conv import DepthwiseConv2d
from .init import init_linear
from .mask import masked
from .norm import Norm, identity


class FFN(nn.Module):
    """Two linear layers with a GELU between them, on maps: (B, H, W, C) -> the same.

    Rows go through in strips that fit a CPU's cache; without grad, the wide map in between is never
    there as a whole. Where there is a convolution, strips overlap, and only go without grad.

    Args:
        dim: C.
        hidden_dim: Channels in between.
        conv_kernel_size: Depthwise convolution after the GELU, with a residual; 0 for none.
    """

    def __init__(self, dim: int, hidden_dim: int, conv_kernel_size: int = 0) -> None:
        super().__init__()
        self.fc1 = init_linear(nn.Linear(dim, hidden_dim))
        self.dwconv = DepthwiseConv2d(hidden_dim, conv_kernel_size) if conv_kernel_size else None
        self.fc2 = init_linear(nn.Linear(hidden_dim, dim))
        self.halo = conv_kernel_size // 2

    def forward(self, x: Tensor, mask: Tensor | None = None, norm: Norm = identity) -> Tensor:
        """(B, H, W, C) -> the same, with a mask as in `masked`, and a norm that comes first."""
        strips = row_strips(x, self.fc1.out_features, least=16 * self.halo, with_grad=not self.halo)
        if len(strips) == 1:
            return self.fc2(self._hidden(norm(x), mask))
        if not self.halo:
            pieces = (self.fc2(self._hidden(norm(piece), None)) for piece in cut(x, strips))
            return join(pieces, strips)

        def hidden(x: Tensor, mask: Tensor | None) -> Tensor:
            return self._hidden(norm(x), mask)

        pieces = (with_halo(hidden, x, mask, strip, self.halo) for strip in strips)
        return join((self.fc2(piece) for piece in pieces), strips)

    def _hidden(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = F.gelu(self.fc1(x))
        return x if self.dwconv is None else x + self.dwconv(masked(x, mask))
