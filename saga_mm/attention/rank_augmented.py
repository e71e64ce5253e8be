"""The attention of RAVLT as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels, D = C / heads.
"""

from torch import Tensor

from saga_kernels import apply_rotary_2d, rank_augmented_linear_attention
from saga_kernels.dispatch import Impl
from saga_kernels.validation import check_impl

from ..layers import rotary_frequencies
from .base import PackedAttention
from .softmax import softmax_attention

MIXERS = ('linear', 'softmax')


class RankAugmentedAttention(PackedAttention):
    """Multi-head attention over all tokens of a map, plus LePE, times an output gate.

    One projection computes q, k, v and the gate. The mixer is rank-augmented linear attention in
    O(N) or softmax attention, both with rotary position encoding. The sum of attention and LePE is
    multiplied by the gate, which has no activation.

    Args:
        dim: C, a multiple of 4 * `num_heads`.
        num_heads: Number of heads.
        mixer: `'linear'` or `'softmax'`. The latter takes O(N^2) time, and O(N) memory because it
            is torch's fused attention.
        eps: Added to the denominator of the linear mixer.
        lepe_kernel_size: Kernel size of the depthwise convolution, odd; 0 for no convolution.
        impl: `'auto'`, `'reference'` or `'triton'` for the linear mixer; see
            `saga_kernels.dispatch`.

    Source: arXiv 2411.07635 and its code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mixer: str = 'linear',
        eps: float = 1e-6,
        lepe_kernel_size: int = 5,
        impl: Impl = 'auto',
    ) -> None:
        super().__init__(dim, num_heads, parts=4, lepe_kernel_size=lepe_kernel_size)
        if self.head_dim % 4:
            raise ValueError(f'dim must be a multiple of 4 * num_heads, got {dim} and {num_heads}')
        if mixer not in MIXERS:
            raise ValueError(f'mixer must be one of {MIXERS}, got {mixer!r}')
        check_impl(impl)
        self.mixer = mixer
        self.eps = eps
        self.impl = impl

    def mix(self, projected: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attention plus LePE, times the gate, and attention alone.

        (B, H, W, 4 * C) -> (B, H, W, C) each.
        """
        dim = self.num_heads * self.head_dim
        qkv, gate = projected.split((3 * dim, dim), dim=-1)
        out, state = super().mix(qkv, mask)
        return out * gate, state

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        """Mix the tokens of a map of `size` (H, W): (B, N, 3, heads, D) -> (B, N, heads, D)."""
        # Computed in each call: a buffer would lose precision when the model is cast to fp16.
        frequencies = rotary_frequencies(self.head_dim, packed.device)
        if self.mixer == 'linear':
            return rank_augmented_linear_attention(
                packed, size, frequencies, eps=self.eps, mask=mask, impl=self.impl
            )
        query, key = apply_rotary_2d(packed[:, :, :2], size, frequencies).unbind(2)
        return softmax_attention(query, key, packed[:, :, 2], mask)
