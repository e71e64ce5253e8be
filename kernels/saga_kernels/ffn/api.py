"""The second half of a transformer block, for inference: x plus two linear layers of its norm."""

import torch
from torch import Tensor

from ..dispatch import TRITON_DTYPES, Impl, resolve_impl, why_not_triton
from ..launch import FFN_CHANNELS
from ..precision import autocast_dtype
from ..validation import check_ffn
from .reference import feed_forward
from .registration import ffn_forward


def ffn(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    *,
    gamma: Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl = 'auto',
) -> Tensor:
    r"""A feed-forward network with its norm and its residual:
    :math:`x + \gamma \, (W_2 \, \mathrm{GELU}(W_1 \, \mathrm{norm}(x) + b_1) + b_2)`.

    The kernel keeps the hidden channels of some tokens on the chip, a few at a time: it reads x and
    writes the result, where PyTorch writes and reads the norm, the hidden channels before and after
    the GELU, and the branch. It has no backward pass, so that it is for inference.

    Args:
        x: (..., C).
        norm: Weight and bias of a layer norm over the channels, (C,) each.
        fc1: Weight (F, C) and bias (F,) of the first linear layer.
        fc2: Weight (C, F) and bias (C,) of the second one.
        gamma: Layer scale (C,); None for none.
        eps: Added to the variance.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`. The kernel takes
            up to 128 channels in half precision and 64 in float32, any F, and nothing that needs a
            gradient.

    Returns:
        (..., C), contiguous, in the widest of the dtypes of x, `gamma` and the linear layers. Under
        autocast, these compute in its dtype. The kernel computes all else in float32. Parameters
        have the dtype of x; the kernel, and autocast, take others.

    Raises:
        ValueError: Wrong shape, dtype or device.
        RuntimeError: `impl='triton'` where the kernel can't run.
    """
    check_ffn(x, norm, fc1, fc2, gamma)
    why = why_not_kernel(x, norm, fc1, fc2, gamma)
    if resolve_impl(impl, 'ffn', why) == 'reference':
        return feed_forward(x, norm, fc1, fc2, gamma, eps)
    dtype = autocast_dtype(x) or x.dtype
    first, second = (weight.to(dtype) for weight, _ in (fc1, fc2))
    return ffn_forward(x, *norm, first, fc1[1], second, fc2[1], gamma, eps)


def why_not_kernel(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    gamma: Tensor | None,
) -> str | None:
    """Why the Triton kernel can't take these arguments of `ffn`, or None."""
    if torch.jit.is_tracing():
        return 'torch.jit.trace records PyTorch alone'
    others = [*norm, *fc1, *fc2, *([] if gamma is None else [gamma])]
    if why := why_not_triton(x, *others):
        return why
    dtype = autocast_dtype(x) or x.dtype
    for kind in (dtype, *(y.dtype for y in others)):
        if kind not in TRITON_DTYPES:
            return f'it takes float16, bfloat16 and float32, not {kind}'
    most = FFN_CHANNELS[dtype.itemsize]
    if x.shape[-1] > most:
        return f'it takes up to {most} channels in {dtype}, not {x.shape[-1]}'
    if torch.is_grad_enabled() and any(y.requires_grad for y in (x, *others)):
        return 'it has no backward pass, and something needs a gradient'
    return None
