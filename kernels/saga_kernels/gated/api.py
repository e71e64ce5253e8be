"""Non-causal linear attention over image tokens, gated (SAGA) and ungated."""

from collections.abc import Sequence

from torch import Tensor

from ..defaults import EPS, FEATURE_MAP
from ..dispatch import Impl, resolve_impl, why_not_triton
from ..validation import check_eps, check_feature_map, check_mask, check_packed
from .eager import attend
from .registration import gated_forward


def gated_linear_attention(
    qkvab: Tensor | Sequence[Tensor],
    *,
    feature_map: str = FEATURE_MAP,
    eps: float = EPS,
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Gated linear attention (SAGA): every token weighs what it adds to the KV state.

    Per head, with row vectors, gate matrix :math:`G_i = \sigma(a_i)^T \sigma(b_i)`:

    .. math::
        S = \sum_i G_i \odot (\phi(k_i)^T v_i)
          = \sum_i (\sigma(a_i) \odot \phi(k_i))^T (\sigma(b_i) \odot v_i), \quad
        z = \sum_i \sigma(a_i) \odot \phi(k_i), \quad
        o_i = \phi(q_i) S / (\phi(q_i) \cdot z + \epsilon)

    The factorised form on the right never builds the gates: memory and time are O(N).

    Args:
        qkvab: (B, N, 5, H, D), float16, bfloat16, float32 or float64: query, key, value and the two
            gate logits, packed as one projection writes them, with any strides. Or a list or tuple
            of these five, (B, N, H, D) each, which are copied into one tensor.
        feature_map: :math:`\phi`, `'elu'` for ELU(x) + 1 or `'relu'`.
        eps: Added to the denominator.
        mask: (B, N) bool. False tokens add nothing to S and z, and their output is zero.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. PyTorch's
            implementation can be differentiated twice, the Triton kernel once.

    Returns:
        (B, N, H, D) in the dtype of the input; sums are taken in float32 or better.

    Raises:
        ValueError: Wrong shape, dtype, feature map, eps or mask.
        RuntimeError: `impl='triton'` where that kernel can't run.

    Source: arXiv 2509.12817 states input-adaptive gates with a Hadamard-product decomposition. This
    form of the gate is the project's reconstruction.
    """
    packed = check_packed('qkvab', qkvab, parts=5)
    return _attention('gated_linear_attention', packed, feature_map, eps, mask, impl)


def linear_attention(
    qkv: Tensor | Sequence[Tensor],
    *,
    feature_map: str = FEATURE_MAP,
    eps: float = EPS,
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Linear attention without gates: :math:`o_i = \phi(q_i) S / (\phi(q_i) \cdot z + \epsilon)`.

    :math:`S = \sum_i \phi(k_i)^T v_i` and :math:`z = \sum_i \phi(k_i)`.

    Args:
        qkv: (B, N, 3, H, D): query, key and value, packed, or these three. Otherwise as in
            `gated_linear_attention`.

    Returns, raises: as `gated_linear_attention`. Source: arXiv 2006.16236.
    """
    packed = check_packed('qkv', qkv, parts=3)
    return _attention('linear_attention', packed, feature_map, eps, mask, impl)


def _attention(
    op: str, packed: Tensor, feature_map: str, eps: float, mask: Tensor | None, impl: str
) -> Tensor:
    check_feature_map(feature_map)
    eps = check_eps(eps)
    check_mask(mask, packed)
    if resolve_impl(impl, op, why_not_triton(packed)) == 'triton':
        return gated_forward(packed, mask, feature_map, eps)[0]
    return attend(packed, feature_map, eps, mask)
