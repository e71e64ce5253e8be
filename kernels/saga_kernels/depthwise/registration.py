"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import kernels_of
from ..registration import refuse_double_backward, register, register_autograd


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    add: Tensor | None,
    mask: Tensor | None,
    residual: bool,
) -> Tensor:
    """add + conv(x) + bias, (B, H, W, C), or x + conv(x) + bias if it is a residual."""
    return kernels_of('depthwise', x).forward(x, weight, bias, x if residual else add, mask)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return kernels_of('depthwise', x).backward(grad, x, weight, mask, residual)


def _forward_fake(x, weight, bias, add, mask, residual):
    dtype = x.dtype if add is None else torch.promote_types(x.dtype, add.dtype)
    return x.new_empty(x.shape, dtype=dtype)


def _backward_fake(grad, x, weight, mask, residual):
    grads = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, weight))
    return *grads, weight.new_empty(weight.shape[:1])


_forward_op = register(
    'depthwise_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? add, Tensor? mask,'
    ' bool residual) -> Tensor',
    _forward,
    _forward_fake,
)
depthwise_backward = register(
    'depthwise_backward(Tensor grad, Tensor x, Tensor weight, Tensor? mask, bool residual)'
    ' -> (Tensor, Tensor, Tensor)',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    x, weight, bias, add, mask, ctx.residual = inputs
    ctx.save_for_backward(x, weight, mask)
    ctx.biased = bias is not None
    ctx.add_dtype = None if add is None else add.dtype


def _differentiate(ctx, grad):
    x, weight, mask = ctx.saved_tensors
    dx, dw, db = depthwise_backward(grad, x, weight, mask, ctx.residual)
    added = None if ctx.add_dtype is None else grad.to(ctx.add_dtype)
    return dx, dw, db if ctx.biased else None, added, None, None


depthwise_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(depthwise_backward)


# A product for each tap of the filter.
@register_flop_formula(torch.ops.saga_kernels.depthwise_forward)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(x_shape) * math.prod(weight_shape[2:])


# The same for the gradient of x and for that of the weights.
@register_flop_formula(torch.ops.saga_kernels.depthwise_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * 2 * math.prod(x_shape) * math.prod(weight_shape[2:])
