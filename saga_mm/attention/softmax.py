"""Softmax attention as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels, D = C / heads.
"""

import torch.nn.functional as F
from torch import Tensor

from .base import PackedAttention


class SoftmaxAttention(PackedAttention):
    """Multi-head softmax attention over all tokens of a map, plus LePE.

    Time is O(N^2); memory is O(N), because torch's fused attention (flash attention in half
    precision on a GPU) never writes the N x N scores.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Number of heads.
        lepe_kernel_size: Kernel size of the depthwise convolution, odd; 0 for no convolution.

    Source: arXiv 1706.03762.
    """

    def __init__(self, dim: int, num_heads: int, *, lepe_kernel_size: int = 3) -> None:
        super().__init__(dim, num_heads, parts=3, lepe_kernel_size=lepe_kernel_size)

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        query, key, value = packed.unbind(2)
        return softmax_attention(query, key, value, mask)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's fused attention on (B, N, heads, D), in which `mask` (B, N) selects the keys."""
    if mask is not None:
        # An image without any token inside would give 0 / 0, so it attends to all of its padding.
        mask = (mask | ~mask.any(1, keepdim=True))[:, None, None]
    # (B, heads, N, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
