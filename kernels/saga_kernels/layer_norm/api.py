"""Layer norm over channels, in the dtype that the next layer reads."""

import torch
from torch import Tensor

from ..dispatch import TRITON_DTYPES, Impl, resolve_impl, why_not_triton
from ..launch import NORM_CHANNELS
from ..validation import check_norm
from .reference import normalize
from .registration import layer_norm_forward


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    r"""Layer norm over the last axis: :math:`(x - \mu) / \sqrt{\sigma^2 + \epsilon} \, w + b`.

    The kernel works on several rows at a time, where that of PyTorch has a block of threads for
    each row, most of which have nothing to do with few channels. It computes in float32.

    Args:
        x: (..., C).
        weight, bias: (C,), in the dtype of x; the kernel, and autocast, take others.
        eps: Added to the variance.
        dtype: That of the result. The matrix product behind a norm would otherwise convert what the
            norm wrote under autocast. Defaults to that of `torch.nn.functional.layer_norm`, which
            is float32 under autocast on a GPU, else that of x.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. The kernel takes
            up to 1024 channels, and can be differentiated once.

    Returns:
        (..., C), contiguous.

    Raises:
        ValueError: Wrong shape, dtype or device.
        RuntimeError: `impl='triton'` where the kernel can't run.
    """
    check_norm(x, weight, bias, dtype)
    if resolve_impl(impl, 'layer_norm', _why_not_triton(x, weight, bias, dtype)) == 'triton':
        return layer_norm_forward(x, weight, bias, eps, dtype or _dtype(x))
    return normalize(x, weight, bias, eps, dtype)


def _dtype(x: Tensor) -> torch.dtype:
    autocast = x.device.type == 'cuda' and torch.is_autocast_enabled('cuda')
    return torch.float32 if autocast else x.dtype


def _why_not_triton(
    x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None
) -> str | None:
    if torch.jit.is_tracing():
        return 'torch.jit.trace records PyTorch alone'
    if why := why_not_triton(x, weight, bias):
        return why
    if x.shape[-1] > NORM_CHANNELS:
        return f'it takes up to {NORM_CHANNELS} channels, not {x.shape[-1]}'
    for kind in (weight.dtype, dtype or x.dtype):
        if kind not in TRITON_DTYPES:
            return f'it takes float16, bfloat16 and float32, not {kind}'
    return None
