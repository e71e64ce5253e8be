"""The block of every backbone. Legend: B batch, H height, W width, C channels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saga_kernels.slices import cut, join, row_strips

from .conv import DepthwiseConv2d
from .drop_path import DropPath


class Block(nn.Module):
    """Positional encoding, attention and FFN, each on a residual: (B, H, W, C) -> the same.

    Args:
        attention, ffn: Modules on (B, H, W, C), its mask, and a norm that comes first.
        dim: C.
        cpe_kernel_size: Depthwise convolution that encodes position; 0 for none.
        drop_path: Rate at which an image skips attention, and FFN.
        norm_layer: Makes a norm over channels.
        layer_scale: Start of a learned factor per channel on attention and FFN; None for no factor.
    """

    def __init__(
        self,
        attention: nn.Module,
        ffn: nn.Module,
        dim: int,
        *,
        cpe_kernel_size: int,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.cpe = DepthwiseConv2d(dim, cpe_kernel_size) if cpe_kernel_size else None
        self.norm1 = norm_layer(dim)
        self.attn = attention
        self.norm2 = norm_layer(dim)
        self.ffn = ffn
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        given = x
        if self.cpe is not None:
            strips = row_strips(x, x.shape[-1], least=16 * self.cpe.halo)
            encoding = self.cpe.strips(x, mask, strips)
            x = join((a + b for a, b in zip(cut(x, strips), encoding, strict=True)), strips)
        x = self._add(x, self.attn(x, mask, self.norm1), self.gamma1, given)
        return self._add(x, self.ffn(x, mask, self.norm2), self.gamma2, given)

    def _add(self, x: Tensor, residual: Tensor, gamma: Tensor | None, given: Tensor) -> Tensor:
        """x plus a residual; without grad in place, if x is not the caller's."""
        residual = self.drop_path(residual if gamma is None else residual * gamma)
        wide = torch.promote_types(x.dtype, residual.dtype) == x.dtype
        if x is given or torch.is_grad_enabled() or not wide:
            return x + residual
        return x.add_(residual)
