"""Bidirectional WKV as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels import bidirectional_wkv
from saga_kernels.dispatch import Impl
from saga_kernels.validation import DecayPer, check_decay_per, check_impl

from ..layers import QShift, init_linear
from .base import PackedAttention

# Smallest and largest initial decay. Those per image are the exponentials of the limits between
# which the parameters of Vision-RWKV start: the smallest gives all tokens of an image nearly the
# same weight, and the largest lets weights fade to 1 / e within a twentieth of the scan. Those per
# token are those of `DecayLinearAttention`.
DECAYS = {'image': (math.exp(-5), math.exp(3)), 'token': (1 / 64, 1 / 4)}


class WKVAttention(PackedAttention):
    """The spatial mix of Vision-RWKV: sigmoid(R) * WKV(K, V), then the output projection.

    One projection computes R, K and V. `saga_kernels.bidirectional_wkv` takes a weighted mean of
    the values in each channel by itself, in O(N): as if each channel were a head. The weights fade
    with the distance in a scan of the map row by row. The decay and the bonus of a token for itself
    are learned per channel. The decay is the exponential of a parameter, so it stays positive.

    Args:
        dim: C.
        decay_per: `'image'`: the decay is relative to the number of tokens of the image, so that a
            channel reaches the same share of an image of any size, as in Vision-RWKV. `'token'`: it
            reaches the same number of tokens.
        decays: Smallest and largest initial decay. The initial decays of the channels divide this
            range in equal ratios. Defaults to `DECAYS` of `decay_per`.
        token_shift: Read the mixtures of `QShift` in place of x.
        lepe_kernel_size: Kernel size of a depthwise convolution of v that is added to WKV, odd; 0
            for no convolution.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`.

    Source: arXiv 2403.02308 (Vision-RWKV), whose code uses the parameter itself as the decay, so
    that it may be negative; the exponential is that of RWKV, arXiv 2305.13048. Chosen by the
    project: equal ratios of the initial decays; a bonus that starts at zero; projections with a
    bias, which start like all linear layers here and not at zero.
    """

    def __init__(
        self,
        dim: int,
        *,
        decay_per: DecayPer = 'image',
        decays: tuple[float, float] | None = None,
        token_shift: bool = False,
        lepe_kernel_size: int = 0,
        impl: Impl = 'auto',
    ) -> None:
        super().__init__(dim, dim, parts=3, lepe_kernel_size=lepe_kernel_size)
        check_decay_per(decay_per)
        check_impl(impl)
        self.decay_per = decay_per
        self.impl = impl
        self.shift = None
        if token_shift:
            self.shift = QShift(dim, 3)
            self.in_proj = init_linear(SplitLinear(dim, 3 * dim))
        low, high = decays or DECAYS[decay_per]
        if not 0 < low <= high < math.inf:
            raise ValueError(f'decays must be positive and in order, got {decays}')
        self.log_decay = nn.Parameter(torch.linspace(math.log(low), math.log(high), dim))
        self.bonus = nn.Parameter(torch.zeros(dim))

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """R, K and V of a map: (B, H, W, C) -> (B, H, W, 3 * C)."""
        if self.shift is None:
            return super().project(x, mask)
        return self.in_proj(*self.shift(x, mask))

    def mix(self, projected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """sigmoid(R) * WKV(K, V), and WKV(K, V) alone: (B, H, W, 3 * C) -> (B, H, W, C) each."""
        out, state = super().mix(projected, mask)
        return projected[..., : self.num_heads].sigmoid() * out, state

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """WKV of the tokens: (B, N, 3, C, 1) -> (B, N, C, 1)."""
        _, key, value = packed.squeeze(4).unbind(2)
        out = bidirectional_wkv(
            key,
            value,
            self.log_decay.exp(),
            self.bonus,
            decay_per=self.decay_per,
            mask=mask,
            impl=self.impl,
        )
        return out.unsqueeze(3)


class SplitLinear(nn.Linear):
    """A linear layer each of whose equal parts of the output reads an input of its own."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """len(inputs) tensors (..., C_in) -> (..., C_out)."""
        number = len(inputs)
        parts = zip(inputs, self.weight.chunk(number), self.bias.chunk(number), strict=True)
        return torch.cat([F.linear(*part) for part in parts], dim=-1)
