"""Gated linear attention as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from saga_kernels import (
    gated_linear_attention,
    kv_state,
    linear_attention,
    read_state,
    sum_states,
)
from saga_kernels.dispatch import resolve_impl, why_not_triton
from saga_kernels.slices import Joined, cut, join, row_strips
from saga_kernels.validation import check_feature_map, check_impl

from ..layers import Norm, identity
from .base import PackedAttention


class GatedLinearAttention(PackedAttention):
    """Multi-head linear attention over all tokens of a map, gated as SAGA does, plus LePE.

    One projection writes q, k, v and the two gate logits, and
    `saga_kernels.gated_linear_attention` mixes the tokens in O(N). Where its reference would run,
    rows go through in strips, from the norm to the KV state, and from there to the output: the
    packed projection is never there as a whole.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Heads.
        gated: Gate the KV state; else plain linear attention.
        gate_bias: Start value of the gate logits' bias; sigmoid(gate_bias) is how far gates stand
            open.
        feature_map: `'elu'` for ELU(x) + 1, or `'relu'`.
        lepe_kernel_size: Kernel of the depthwise convolution, odd; 0 for none.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`.

    Source: gates from arXiv 2509.12817, in the project's reconstruction.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gated: bool = True,
        gate_bias: float = 2.0,
        feature_map: str = 'elu',
        lepe_kernel_size: int = 3,
        impl: str = 'auto',
    ) -> None:
        super().__init__(dim, num_heads, parts=5 if gated else 3, lepe_kernel_size=lepe_kernel_size)
        check_feature_map(feature_map)
        check_impl(impl)
        self.op = gated_linear_attention if gated else linear_attention
        self.feature_map = feature_map
        self.impl = impl
        if gated:
            nn.init.constant_(self.in_proj.bias[3 * dim :], gate_bias)

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        return self.op(packed, feature_map=self.feature_map, mask=mask, impl=self.impl)

    def forward(self, x: Tensor, mask: Tensor | None = None, norm: Norm = identity) -> Tensor:
        strips = self._strips(x)
        if len(strips) == 1:
            return super().forward(x, mask, norm)
        return self._forward_strips(x, mask, norm, strips)

    def _strips(self, x: Tensor) -> Sequence[slice]:
        """Strips of rows for the reference; one, the whole map, for the kernel."""
        least = 16 * self.lepe.halo if self.lepe is not None else 1
        strips = row_strips(x, x.shape[-1], least=least, with_grad=True)
        if len(strips) > 1:
            tokens = x.flatten(1, 2).unflatten(-1, (1, self.num_heads, self.head_dim))
            impl = resolve_impl(self.impl, self.op.__name__, why_not_triton(tokens))
            if impl == 'triton':
                return [slice(None)]
        return strips

    def _forward_strips(
        self, x: Tensor, mask: Tensor | None, norm: Norm, strips: Sequence[slice]
    ) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        # (B, N) each
        masks = [None] * len(strips)
        if mask is not None:
            masks = [strip.flatten(1) for strip in cut(mask, strips)]
        queries, values, states = Joined(strips), Joined(strips), []
        for piece, inside in zip(cut(x, strips), masks, strict=True):
            # (B, N, heads, D) each
            parts = self.in_proj(norm(piece)).flatten(1, 2).unflatten(-1, (-1, *heads)).unbind(2)
            states.append(kv_state(*parts[1:], feature_map=self.feature_map, mask=inside))
            queries.append(parts[0].reshape(piece.shape))
            if self.lepe is not None:
                values.append(parts[2].reshape(piece.shape))
        state = sum_states(states)
        places = [None] * len(strips)
        if self.lepe is not None:
            places = self.lepe.strips(values.whole(), mask, strips)

        def outs() -> Iterator[Tensor]:
            for query, place, inside in zip(queries.pieces, places, masks, strict=True):
                tokens = query.flatten(1, 2).unflatten(-1, heads)
                out = read_state(tokens, state, self.feature_map, mask=inside).reshape(query.shape)
                yield self.proj(out if place is None else out + place)

        # in the place of the queries, which nobody needs then
        return join(outs(), strips, None if torch.is_grad_enabled() else queries.whole())
