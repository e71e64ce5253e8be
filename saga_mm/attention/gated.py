"""Gated linear attention as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

from functools import partial

from torch import Tensor, nn

from saga_kernels import gated_linear_attention, linear_attention
from saga_kernels.validation import check_feature_map, check_impl

from ..layers import DepthwiseConv2d, init_linear


class GatedLinearAttention(nn.Module):
    """Multi-head linear attention over all tokens of a map, gated as SAGA does, plus LePE.

    One projection writes q, k, v and the two gate logits; `saga_kernels.gated_linear_attention`
    mixes the tokens in O(N); LePE, a depthwise convolution of v, is added; then the output
    projection.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Heads.
        gated: Gate the KV state; else plain linear attention.
        gate_bias: Start value of the gate logits' bias; sigmoid(gate_bias) is how far gates stand
            open.
        feature_map: `'elu'` for ELU(x) + 1, or `'relu'`.
        lepe_kernel_size: Kernel of the depthwise convolution, odd; 0 for none.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`.

    Source: gates from arXiv 2509.12817, in the project's reconstruction; LePE from
    arXiv 2107.00652.
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
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f'dim must be a multiple of num_heads, got {dim} and {num_heads}')
        check_feature_map(feature_map)
        check_impl(impl)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.parts = 5 if gated else 3
        self.attend = partial(
            gated_linear_attention if gated else linear_attention,
            feature_map=feature_map,
            impl=impl,
        )
        self.in_proj = init_linear(nn.Linear(dim, self.parts * dim))
        if gated:
            nn.init.constant_(self.in_proj.bias[3 * dim :], gate_bias)
        self.lepe = DepthwiseConv2d(dim, lepe_kernel_size) if lepe_kernel_size else None
        self.proj = init_linear(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of a map: (B, H, W, C) -> (B, H, W, C)."""
        # (B, H, W, parts * C)
        projected = self.in_proj(x)
        packed = projected.reshape(
            x.shape[0], x.shape[1] * x.shape[2], self.parts, self.num_heads, self.head_dim
        )
        out = self.attend(packed).reshape(x.shape)
        if self.lepe is not None:
            dim = x.shape[-1]
            out = out + self.lepe(projected[..., 2 * dim : 3 * dim])
        return self.proj(out)
