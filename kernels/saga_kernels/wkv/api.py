"""Bidirectional WKV: per channel, a mean over all tokens whose weights fade with the distance."""

import torch
from torch import Tensor

from ..dispatch import Impl, resolve_impl, why_not_triton
from ..tracing import is_tracing_or_compiling
from ..validation import (
    DecayPer,
    check_channels,
    check_decay,
    check_decay_per,
    check_mask,
    check_tokens,
)
from . import export
from .eager import attend
from .registration import wkv_forward


def bidirectional_wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    *,
    decay_per: DecayPer = 'image',
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Weighted mean of the values over all tokens, in each channel by itself.

    With tokens in the order in which they come, and N of them:

    .. math::
        o_t = \frac{\sum_{i \neq t} e^{-(|t - i| - 1) w / N + k_i} v_i + e^{u / N + k_t} v_t}
        {\sum_{i \neq t} e^{-(|t - i| - 1) w / N + k_i} + e^{u / N + k_t}}

    Memory and time are O(N). Exponents are taken relative to the largest, so that keys of 1e4 and a
    decay of 1e4 per token are as good as small ones.

    Args:
        k: (B, N, C), float16, bfloat16, float32 or float64: the logarithms of the weights. In code
            that is compiled for a CPU or exported, they must lie between -1e4 and 1e4, and so must
            the bonus, and there may be 2^22 tokens at most.
        v: (B, N, C), the values, in the dtype of `k`.
        w: (C,), floating point, the decay; not negative. That is checked on a CPU in eager mode
            only: looking at values would wait for a GPU.
        u: (C,), floating point, the bonus of a token for itself.
        decay_per: `'image'` divides w and u by N, as Vision-RWKV does: how far a channel reaches is
            a share of the image, and stays so when a model sees larger images than it was trained
            on. `'token'` does not: it reaches equally many tokens in every image.
        mask: (B, N) bool. False tokens add nothing and do not count as distance, nor to N, so that
            padding changes nothing; their output is zero.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. PyTorch's
            implementation can be differentiated twice, the Triton kernel once.

    Returns:
        (B, N, C) in the dtype of `v`; sums are taken in float32 or better.

    Raises:
        ValueError: Wrong shape, dtype, device, decay, `decay_per`, mask or `impl`.
        RuntimeError: `impl='triton'` where that kernel can't run.

    Source: arXiv 2403.02308 (Vision-RWKV).
    """
    check_tokens('k', k)
    check_tokens('v', v, like=('k', k))
    check_decay(w, k)
    check_channels('u', u, k)
    check_decay_per(decay_per)
    check_mask(mask, k)
    why = why_not_triton(k, w, u) or why_not_triton(v)
    choice = resolve_impl(impl, 'bidirectional_wkv', why)
    if choice == 'reference' and is_tracing_or_compiling():
        return export.attend(k, v, w, u, decay_per, mask)
    decay, bonus = (_per_token(x, k, mask, decay_per) for x in (w, u))
    if choice == 'triton':
        return wkv_forward(k, v, decay, bonus, mask)[0]
    return attend(k, v, decay, bonus, mask)


def _per_token(x: Tensor, k: Tensor, mask: Tensor | None, decay_per: str) -> Tensor:
    """A decay or bonus (C,) per token of each image, (1, C) or (B, C)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if decay_per == 'token':
        return x[None]
    if mask is None:
        return x[None] / max(k.shape[1], 1)
    return x / mask.sum(1, keepdim=True).clamp(min=1)
