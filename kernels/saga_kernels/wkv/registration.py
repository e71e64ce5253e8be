"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see.

Autocast does not change the ops: they keep the dtype of the input, and sums are fp32 in every
dtype, as in the implementation in PyTorch.
"""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..chunks import ceil_div
from ..dispatch import kernels_of
from ..launch import WKV_CHUNK, WKV_STEPS
from ..registration import refuse_double_backward, register, register_autograd


def _forward(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, C) of k, v (B, N, C) with a decay and bonus per token, w, u (B or 1, C); and
    what its gradient needs, in fp32: the states where each chunk begins and ends (B, chunks, 2, 3,
    C), those that the tokens of a chunk before each of its tiles add (B, tiles, 3, C), and the
    number of tokens of each chunk that count (B, chunks)."""
    return kernels_of('wkv', k, v).forward(k, v, w, u, mask)


def _backward(
    grad: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor,
    earlier: Tensor,
    count: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v, w and u."""
    return kernels_of('wkv', k, v).backward(grad, k, v, w, u, state, earlier, count, mask)


def _forward_fake(k, v, w, u, mask):
    batch, tokens, channels = k.shape
    chunks, tiles = ceil_div(tokens, WKV_CHUNK), ceil_div(tokens, WKV_STEPS)
    shapes = (batch, chunks, 2, 3, channels), (batch, tiles, 3, channels), (batch, chunks)
    sums = (k.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return torch.empty_like(v, memory_format=torch.contiguous_format), *sums


def _backward_fake(grad, k, v, w, u, state, earlier, count, mask):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, w, u))


_forward_op = register(
    'wkv_forward(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? mask)'
    ' -> (Tensor, Tensor, Tensor, Tensor)',
    _forward,
    _forward_fake,
)
wkv_backward = register(
    'wkv_backward(Tensor grad, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state,'
    ' Tensor earlier, Tensor count, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    *tensors, mask = inputs
    _, *sums = output
    ctx.save_for_backward(*tensors, *sums, mask)
    ctx.mark_non_differentiable(*sums)


def _differentiate(ctx, grad, *_):
    return *wkv_backward(grad, *ctx.saved_tensors), None


wkv_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(wkv_backward)


# One multiplication and addition per token and channel for each of two sums in two directions, and
# for the token's own part of each sum.
@register_flop_formula(torch.ops.saga_kernels.wkv_forward)
def _forward_flops(k_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * (2 * 2 + 2) * math.prod(k_shape)


# The same, and two products in each direction for the gradient of w.
@register_flop_formula(torch.ops.saga_kernels.wkv_backward)
def _backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * (2 * 2 + 2 + 2 * 2) * math.prod(grad_shape)
