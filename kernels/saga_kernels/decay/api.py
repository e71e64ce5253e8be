"""Non-causal linear attention whose weights decay with the distance in a scan of the map."""

from collections.abc import Sequence

from torch import Tensor

from ..defaults import EPS, FEATURE_MAP
from ..dispatch import Impl, resolve_impl, why_not_triton
from ..validation import (
    check_eps,
    check_feature_map,
    check_log_decay,
    check_mask,
    check_packed,
    check_size,
)
from .eager import attend
from .registration import decay_forward


def decay_linear_attention(
    qkv: Tensor | Sequence[Tensor],
    log_decay: Tensor,
    size: tuple[int, int],
    *,
    feature_map: str = FEATURE_MAP,
    eps: float = EPS,
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Linear attention in which every token weighs less the farther away it is in a scan.

    Per head h, with row vectors, decay :math:`\gamma_h = \exp(\mathrm{log\_decay}_h) \in (0, 1]`
    and position p in the head's scan:

    .. math::
        S_i = \sum_j \gamma_h^{|p(i) - p(j)|} \phi(k_j)^T v_j, \quad
        z_i = \sum_j \gamma_h^{|p(i) - p(j)|} \phi(k_j), \quad
        o_i = \phi(q_i) S_i / (\phi(q_i) \cdot z_i + \epsilon)

    The first half of the heads scans the map row by row, the other half column by column; of an odd
    number, the first (H + 1) / 2 heads scan rows. With a decay of 1 it is `linear_attention`.
    Memory and time are O(N).

    Args:
        qkv: (B, N, 3, H, D), float16, bfloat16, float32 or float64: query, key and value, packed as
            one projection writes them, with any strides; tokens row by row. Or a list or tuple of
            these three, (B, N, H, D) each, which are copied into one tensor.
        log_decay: (H,), floating point, not positive. This is not checked, since to look at values
            is to wait for the GPU. Its gradient is exact.
        size: (height, width) of the map in tokens, height * width = N.
        feature_map: :math:`\phi`, `'elu'` for ELU(x) + 1 or `'relu'`.
        eps: Added to the denominator.
        mask: (B, N) bool. False tokens add nothing to S and z, and their output is zero; they keep
            their place in the scan.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. PyTorch's
            implementation can be differentiated twice, the Triton kernel once.

    Returns:
        (B, N, H, D) in the dtype of `qkv`; sums are taken in float32 or better.

    Raises:
        ValueError: Wrong shape, dtype, device, size, feature map, eps or mask.
        RuntimeError: `impl='triton'` where that kernel can't run.

    Source: after the linear attention with exponential distance decay that arXiv 2601.11164
    (SoLA-Vision) is about. Two-sided decay along two scans is the project's choice.
    """
    qkv = check_packed('qkv', qkv, parts=3)
    size = check_size(size, qkv.shape[1])
    check_log_decay(log_decay, qkv)
    check_feature_map(feature_map)
    eps = check_eps(eps)
    check_mask(mask, qkv)
    if resolve_impl(impl, 'decay_linear_attention', why_not_triton(qkv, log_decay)) == 'triton':
        return decay_forward(qkv, log_decay, mask, size[1], feature_map, eps)[0]
    return attend(qkv, log_decay, size, feature_map, eps, mask)
