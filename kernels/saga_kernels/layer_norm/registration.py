"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see."""

import torch
from torch import Tensor

from ..dispatch import kernels_of
from ..registration import refuse_double_backward, register, register_autograd


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The normalised x (..., C) in a dtype."""
    return kernels_of('layer_norm', x).forward(x, weight, bias, eps, dtype)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return kernels_of('layer_norm', x).backward(grad, x, weight, eps)


def _forward_fake(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype)


def _backward_fake(grad, x, weight, eps):
    return tuple(
        torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, weight, weight)
    )


_forward_op = register(
    'layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype)'
    ' -> Tensor',
    _forward,
    _forward_fake,
)
layer_norm_backward = register(
    'layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps)'
    ' -> (Tensor, Tensor, Tensor)',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    return *layer_norm_backward(grad, x, weight, ctx.eps), None, None


layer_norm_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(layer_norm_backward)
