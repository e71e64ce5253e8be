"""Gated linear attention as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

from torch import Tensor, nn

from saga_kernels import gated_linear_attention, linear_attention
from saga_kernels.dispatch import Impl
from saga_kernels.validation import check_feature_map, check_impl

from ..layers import QKNorm
from .base import PackedAttention


class GatedLinearAttention(PackedAttention):
    """Multi-head linear attention over all tokens of a map, gated as SAGA does, plus LePE.

    One projection computes q, k, v and the two gate logits, and
    `saga_kernels.gated_linear_attention` mixes the tokens in O(N).

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Number of heads.
        gated: Apply gates to what enters the KV state. False gives plain linear attention.
        gate_bias: Initial bias of the gate logits, so that the gates start near sigmoid(gate_bias).
        qk_norm: Initial gain and bias of a `QKNorm` of q and k; None for no norm.
        feature_map: `'elu'` for ELU(x) + 1, or `'relu'`.
        lepe_kernel_size: Kernel size of the depthwise convolution, odd; 0 for no convolution.
        output_gate: Multiply attention plus LePE by a gate, as in `PackedAttention`.
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
        qk_norm: tuple[float, float] | None = None,
        feature_map: str = 'elu',
        lepe_kernel_size: int = 3,
        output_gate: bool = False,
        impl: Impl = 'auto',
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            parts=5 if gated else 3,
            lepe_kernel_size=lepe_kernel_size,
            output_gate=output_gate,
        )
        check_feature_map(feature_map)
        check_impl(impl)
        self.op = gated_linear_attention if gated else linear_attention
        self.feature_map = feature_map
        self.impl = impl
        self.qk_norm = None if qk_norm is None else QKNorm(dim, num_heads, *qk_norm)
        if gated:
            nn.init.constant_(self.in_proj.bias[3 * dim :], gate_bias)

    def project(self, x: Tensor, mask: Tensor | None) -> Tensor:
        projected = super().project(x, mask)
        return projected if self.qk_norm is None else self.qk_norm(projected)

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        return self.op(packed, feature_map=self.feature_map, mask=mask, impl=self.impl)
