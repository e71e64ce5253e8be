"""Feed-forward network of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels.slices import cut, join, token_slices

from .conv import DepthwiseConv2d
from .init import init_linear
from .mask import masked


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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        height, row = x.shape[1], x[:, :1].numel() // x.shape[-1] * self.fc1.out_features
        strips = token_slices(
            height,
            row * x.element_size(),
            x.device,
            least=16 * self.halo,
            with_grad=not self.halo,
        )
        if len(strips) == 1:
            return self.fc2(self._hidden(x, mask))
        if self.halo:
            return join((self._strip(x, mask, strip) for strip in strips), strips)
        pieces = cut(x, strips)
        return join((self.fc2(self._hidden(piece, None)) for piece in pieces), strips)

    def _strip(self, x: Tensor, mask: Tensor | None, strip: slice) -> Tensor:
        rows = slice(max(0, strip.start - self.halo), strip.stop + self.halo)
        hidden = self._hidden(x[:, rows], None if mask is None else mask[:, rows])
        return self.fc2(hidden[:, strip.start - rows.start : strip.stop - rows.start])

    def _hidden(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = F.gelu(self.fc1(x))
        return x if self.dwconv is None else x + self.dwconv(masked(x, mask))
