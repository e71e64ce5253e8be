"""Rank-augmented linear attention over the tokens of an image (RALA)."""

from collections.abc import Sequence

from torch import Tensor

from ..defaults import EPS
from ..dispatch import Impl, resolve_impl, why_not_triton
from ..validation import check_eps, check_frequencies, check_mask, check_packed, check_size
from .eager import attend
from .registration import rank_augmented_forward


def rank_augmented_linear_attention(
    qkv: Tensor | Sequence[Tensor],
    size: tuple[int, int],
    frequencies: Tensor,
    *,
    eps: float = EPS,
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Rank-augmented linear attention (RALA): a global query weighs what enters the KV state.

    Per head, with row vectors, :math:`\phi(x) = \mathrm{ELU}(x) + 1` and :math:`R_i` the rotation
    of token i:

    .. math::
        \alpha = \mathrm{softmax}_j(D^{-1/2} \, \bar q \cdot \phi(k_j)), \quad
        \bar q = \mathrm{mean}_i \, \phi(q_i), \quad
        S = \sum_j \alpha_j (\phi(k_j) R_j)^T v_j, \quad
        z = \sum_j \alpha_j \phi(k_j), \quad
        o_i = \phi(q_i) R_i S / (\phi(q_i) \cdot z + \epsilon)

    Only the numerator is rotated. The rotation turns neighbouring channels 2c and 2c + 1 by
    :math:`row \cdot f_c` in the first half of the head, and by :math:`column \cdot f_{c - D/4}` in
    the second. Memory and time are O(N).

    Args:
        qkv: (B, N, 3, H, D), float16, bfloat16, float32 or float64: query, key and value, packed
            as one projection writes them, with any strides; D divisible by 4. Or a list or tuple of
            these three, (B, N, H, D) each, which are copied into one tensor.
        size: (height, width) of the image in tokens, row by row; height * width = N.
        frequencies: (D / 4,) radians per token, f above; no gradient. Angles are computed in
            float32, or float64 for a float64 input.
        eps: Added to the denominator.
        mask: (B, N) bool. False tokens add nothing to the mean, the softmax, S and z, and their
            output is zero.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. PyTorch's
            implementation can be differentiated twice, the Triton kernel once.

    Returns:
        (B, N, H, D) in the dtype of the input; sums are taken in float32 or better.

    Raises:
        ValueError: Wrong shape, dtype, size, frequencies, eps or mask.
        RuntimeError: `impl='triton'` where that kernel can't run.

    Source: arXiv 2411.07635 and its official code, whose factors of N cancel. Left out here, to
    stand in a module: the local encoding of v and the gate on the output.
    """
    qkv = check_packed('qkv', qkv, parts=3)
    size = check_size(size, qkv.shape[1])
    check_frequencies(frequencies, qkv)
    eps = check_eps(eps)
    check_mask(mask, qkv)
    op = 'rank_augmented_linear_attention'
    if resolve_impl(impl, op, why_not_triton(qkv)) == 'triton':
        return rank_augmented_forward(qkv, frequencies, mask, size[1], eps)[0]
    return attend(qkv, size, frequencies, eps, mask)
