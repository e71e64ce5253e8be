"""What the attention modules share.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

import torch
from torch import Tensor, nn

from ..layers import DepthwiseConv2d, Norm, identity, init_linear, masked


class PackedAttention(nn.Module):
    """Multi-head attention over all tokens of a map from one projection, plus LePE.

    One projection writes q, k, v and whatever else a mechanism needs; `attend`, which a subclass
    provides, mixes the tokens; LePE, a depthwise convolution of v, is added; then the output
    projection.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Heads.
        parts: What the projection writes, C channels each: q, k, v, then the rest.
        lepe_kernel_size: Kernel of the depthwise convolution, odd; 0 for none.

    Source: LePE from arXiv 2107.00652.
    """

    def __init__(self, dim: int, num_heads: int, *, parts: int, lepe_kernel_size: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim must be a multiple of num_heads, got {dim} and {num_heads}')
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.parts = parts
        self.in_proj = init_linear(nn.Linear(dim, parts * dim))
        self.lepe = DepthwiseConv2d(dim, lepe_kernel_size) if lepe_kernel_size else None
        self.proj = init_linear(nn.Linear(dim, dim))

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of a map of `size` (H, W): (B, N, parts, heads, D) -> (B, N, heads, D).

        Tokens where `mask` (B, N) is False have no part in it; what they get does not matter.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None, norm: Norm = identity) -> Tensor:
        """Mix the tokens of a map: (B, H, W, C) -> (B, H, W, C), with a mask as in `masked`, and a
        norm that comes first."""
        return self.proj(self.mix(self.in_proj(norm(x)), mask))

    def mix(self, projected: Tensor, mask: Tensor | None) -> Tensor:
        """Attention plus LePE: (B, H, W, parts * C), q, k, v first, -> (B, H, W, C)."""
        batch, height, width, channels = projected.shape
        dim = self.num_heads * self.head_dim
        projected, values = with_channels(projected, 2 * dim, 3 * dim)
        # LePE first, for it needs a copy of the values for a moment
        position = None if self.lepe is None else self.lepe(masked(values, mask))
        parts = channels // dim
        packed = projected.reshape(batch, height * width, parts, self.num_heads, self.head_dim)
        tokens = None if mask is None else mask.flatten(1)
        out = self.attend(packed, (height, width), tokens).reshape(batch, height, width, dim)
        # in place: what a forward hook on LePE keeps becomes the sum, unless it is cloned
        return out if position is None else position.add_(out)


def with_channels(x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """x, and its channels from `start` to `stop` on the last axis.

    Where both are used, autograd would fill up the gradient of the slice with zeros, and add it to
    that of the rest: three passes over all channels, of which this spares the memory.
    """
    if torch.compiler.is_compiling():
        return x, x[..., start:stop]
    return _WithChannels.apply(x, start, stop)


class _WithChannels(torch.autograd.Function):
    @staticmethod
    def forward(x, start, stop):
        return x.view_as(x), x[..., start:stop]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.start, ctx.stop = inputs

    @staticmethod
    def backward(ctx, grad, grad_channels):
        # In its place, for nobody else has this gradient, unless it is to be differentiated, or
        # its elements share memory.
        if torch.is_grad_enabled() or not grad.is_contiguous():
            grad = grad.clone(memory_format=torch.contiguous_format)
        grad[..., ctx.start : ctx.stop] += grad_channels
        return grad, None, None
