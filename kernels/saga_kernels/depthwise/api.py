"""Depthwise convolution of channels-last maps, added to another map."""

import torch
from torch import Tensor

from ..dispatch import TRITON_DTYPES, Impl, resolve_impl, why_not_triton
from ..launch import DEPTHWISE_COLUMNS
from ..validation import check_depthwise
from .reference import convolve
from .registration import depthwise_forward


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    add: Tensor | None = None,
    mask: Tensor | None = None,
    impl: Impl = 'auto',
) -> Tensor:
    """Depthwise convolution with stride 1, plus another map: add + conv(x) + bias.

    The kernel reads x and `add` and writes the result, all of them once and in place, where PyTorch
    would copy a strided x and pass over the map once more for the bias and once more for the sum.

    Args:
        x: (B, H, W, C), with any strides, such as the values in a packed projection. Beyond the
            border it is zero.
        weight: (C, 1, K, K) with an odd K, in the dtype of x; the kernel, and autocast, also take
            others.
        bias: (C,) or None, in the dtype of `weight`.
        add: (B, H, W, C), which may be x itself; None adds nothing.
        mask: (B, H, W, 1) bool. Where it is False, x counts as zero, whatever it holds, NaN
            included.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. The kernel takes
            K up to 5, and can be differentiated once.

    Returns:
        (B, H, W, C) in the wider of the dtypes of x and `add`. The kernel takes sums in float32.
        Under autocast, PyTorch convolves in the dtype of autocast.

    Raises:
        ValueError: Wrong shape, dtype or device.
        RuntimeError: `impl='triton'` where the kernel can't run.
    """
    check_depthwise(x, weight, bias, add, mask)
    why = _why_not_triton(x, weight, bias, add)
    if resolve_impl(impl, 'depthwise_conv2d', why) == 'triton':
        residual = add is x
        return depthwise_forward(x, weight, bias, None if residual else add, mask, residual)
    return convolve(x, weight, bias, add, mask)


def _why_not_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None
) -> str | None:
    if torch.jit.is_tracing():
        return 'torch.jit.trace records PyTorch alone'
    others = [y for y in (weight, bias, add) if y is not None]
    if why := why_not_triton(x, *others):
        return why
    if weight.shape[-1] not in DEPTHWISE_COLUMNS:
        side = max(DEPTHWISE_COLUMNS)
        return f'it takes filters of up to {side} pixels a side, not {weight.shape[-1]}'
    for y in others:
        if y.dtype not in TRITON_DTYPES:
            return f'it takes float16, bfloat16 and float32, not {y.dtype}'
    return None
