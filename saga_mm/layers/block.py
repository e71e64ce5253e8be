"""The block of every backbone. Legend: B batch, H height, W width, C channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .conv import DepthwiseConv2d, add_conv
from .drop_path import DropPath
from .norm import before_linear


class Block(nn.Module):
    """Positional encoding, attention and FFN, each added to its input.

    Maps (B, H, W, C) and an optional mask as in `mask_padding` to (B, H, W, C). If the attention
    also returns its hidden state, the block returns both: its map and that state.

    Args:
        attention, ffn: Modules that map (B, H, W, C) and its mask to (B, H, W, C).
        dim: C.
        cpe_kernel_size: Kernel size of the depthwise convolution that encodes position; 0 for none.
        drop_path: Probability with which a sample skips attention, and that with which it skips the
            FFN.
        norm_layer: Makes a norm over a number of channels.
        layer_scale: Initial value of a learned factor per channel on attention and FFN; None for no
            factor.
    """

    attn: Any
    ffn: Any
    norm2: Any
    cpe: DepthwiseConv2d | None
    gamma1: nn.Parameter | None
    gamma2: nn.Parameter | None

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
        before_linear(self.norm1)
        before_linear(self.norm2)
        self.drop_path1 = DropPath(drop_path)
        self.drop_path2 = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((dim,), float(layer_scale)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        x, *state = self.attend(self.encode(x, mask), mask)
        x = self.feed_forward(x, mask)
        return (x, *state) if state else x

    def encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x plus its positional encoding."""
        return x if self.cpe is None else add_conv(x, self.cpe, x, mask)

    def attend(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """x plus attention: a map, and the hidden state if the attention returns one."""
        y, *state = unpack(self.attn(self.norm1(x), mask))
        return x + self.drop_path1(scale(y, self.gamma1)), *state

    def feed_forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x plus the FFN."""
        return x + self.drop_path2(scale(self.ffn(self.norm2(x), mask), self.gamma2))


def unpack(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output of a module: its map and, if it also returns hidden states, these."""
    return out if isinstance(out, tuple) else (out,)


def scale(x: Tensor, gamma: Tensor | None) -> Tensor:
    """Layer scale, arXiv 2103.17239: x times a factor per channel, or x if there is no factor."""
    return x if gamma is None else x * gamma
