"""The base class of the attention modules.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from saga_kernels import is_tracing_or_compiling

from ..layers import DepthwiseConv2d, add_conv, init_linear


class PackedAttention(nn.Module):
    """Multi-head attention over all tokens of a map from one projection, plus LePE.

    One projection computes q, k, v and what else a mechanism needs. The method `attend`, which a
    subclass provides, mixes the tokens. LePE, a depthwise convolution of v, is added, the sum is
    multiplied by the output gate, if there is one, and the output projection is applied.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Number of heads.
        parts: Number of tensors of C channels that the projection computes: q, k, v, then the rest.
        lepe_kernel_size: Kernel size of the depthwise convolution, odd; 0 for no convolution.
        output_gate: Multiply by a gate, a linear function of the input without an activation, which
            starts near 1.

    Attributes:
        returns_state: Return the hidden state as well, which is the result of `attend`, for a
            `HiddenStateBridge`. False unless it is set.

    Source: LePE from arXiv 2107.00652, the output gate from arXiv 2411.07635. There, it starts
    near 0.
    """

    returns_state = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        parts: int,
        lepe_kernel_size: int,
        output_gate: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim must be a multiple of num_heads, got {dim} and {num_heads}')
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.parts = parts
        self.in_proj = init_linear(nn.Linear(dim, parts * dim))
        self.lepe = DepthwiseConv2d(dim, lepe_kernel_size) if lepe_kernel_size else None
        self.output_gate = init_linear(nn.Linear(dim, dim)) if output_gate else None
        if self.output_gate is not None:
            nn.init.ones_(self.output_gate.bias)
        self.proj = init_linear(nn.Linear(dim, dim))

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of a map of `size` (H, W): (B, N, parts, heads, D) -> (B, N, heads, D).

        Tokens where `mask` (B, N) is False do not influence others, and their output is not used.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of a map (B, H, W, C) -> the same shape; mask as in `mask_padding`.

        With `returns_state`, the result is a pair of that map and the hidden state, (B, H, W, C).
        """
        out, state = self.mix(self.project(x, mask), mask)
        if self.output_gate is not None:
            out = out * self.output_gate(x)
        out = self.proj(out)
        return (out, state) if self.returns_state else out

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """q, k, v, then the rest, of each token: (B, H, W, C) -> (B, H, W, parts * C)."""
        return self.in_proj(x)

    def mix(self, projected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention plus LePE, and attention alone: (B, H, W, parts * C) -> (B, H, W, C) each."""
        batch, height, width, channels = projected.shape
        dim = self.num_heads * self.head_dim
        if self.lepe is not None:
            projected, value = with_channels(projected, 2 * dim, 3 * dim)
        packed = projected.reshape(
            batch, height * width, channels // dim, self.num_heads, self.head_dim
        )
        tokens = None if mask is None else mask.flatten(1)
        state = self.attend(packed, (height, width), tokens).reshape(batch, height, width, dim)
        if self.lepe is None:
            return state, state
        return add_conv(state, self.lepe, value, mask), state


def with_channels(x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """A tensor, and a view of its channels from `start` to `stop`: the last axis.

    The gradient of a plain slice is a tensor as large as x, zero in all other channels, which
    autograd then adds to the gradient of x. Here, only the channels of the slice are added.
    """
    if is_tracing_or_compiling():
        return x, x[..., start:stop]
    return _WithChannels.apply(x, start, stop)


class _WithChannels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return x.view_as(x), x[..., start:stop]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Any) -> None:
        _, ctx.start, ctx.stop = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_channels: Tensor) -> tuple[Tensor, None, None]:
        # A new tensor, because a hook may have kept `grad`.
        total = grad[..., ctx.start : ctx.stop] + grad_channels
        return grad.slice_scatter(total, -1, ctx.start, ctx.stop), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        return tangent.view_as(tangent), tangent[..., ctx.start : ctx.stop]
