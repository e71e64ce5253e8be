"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see.

Autocast does not change the ops: they keep the dtype of the input, and sums are fp32 in every
dtype, as in the implementation in PyTorch.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..chunks import ceil_div
from ..dispatch import kernels_of
from ..launch import decay_chunk
from ..registration import refuse_double_backward, register, register_autograd


def _forward(
    qkv: Tensor,
    log_decay: Tensor,
    mask: Tensor | None,
    width: int,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, H, D) of qkv (B, N, 3, H, D), and what its gradient needs, in fp32: two states
    of each chunk (B, H, C, 2, D + 1, D), and the reciprocal of each denominator (B, H, N)."""
    elu = feature_map == 'elu'
    return kernels_of('decay', qkv).forward(qkv, log_decay, mask, width, elu, eps)


def _backward(
    grad: Tensor,
    qkv: Tensor,
    log_decay: Tensor,
    out: Tensor,
    state: Tensor,
    r: Tensor,
    mask: Tensor | None,
    width: int,
    feature_map: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed projection and of log_decay. That of the projection is one tensor,
    for an op must not return views of a buffer."""
    elu = feature_map == 'elu'
    kernels = kernels_of('decay', qkv)
    return kernels.backward(grad, qkv, log_decay, out, state, r, mask, width, elu)


def _forward_fake(qkv, log_decay, mask, width, feature_map, eps):
    batch, tokens, _, heads, dim = qkv.shape
    chunks = ceil_div(tokens, decay_chunk(qkv.dtype, dim))
    shapes = (batch, heads, chunks, 2, dim + 1, dim), (batch, heads, tokens)
    sums = (qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return qkv.new_empty((batch, tokens, heads, dim)), *sums


def _backward_fake(grad, qkv, log_decay, out, state, r, mask, width, feature_map):
    grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    return grad, torch.empty_like(log_decay, memory_format=torch.contiguous_format)


_forward_op = register(
    'decay_forward(Tensor qkv, Tensor log_decay, Tensor? mask, SymInt width, str feature_map,'
    ' float eps) -> (Tensor, Tensor, Tensor)',
    _forward,
    _forward_fake,
)
decay_backward = register(
    'decay_backward(Tensor grad, Tensor qkv, Tensor log_decay, Tensor out, Tensor state, Tensor r,'
    ' Tensor? mask, SymInt width, str feature_map) -> (Tensor, Tensor)',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    qkv, log_decay, mask, ctx.width, ctx.feature_map, _ = inputs
    out, *sums = output
    ctx.save_for_backward(qkv, log_decay, out, *sums, mask)
    ctx.mark_non_differentiable(*sums)


def _differentiate(ctx, grad, *_):
    grads = decay_backward(grad, *ctx.saved_tensors, ctx.width, ctx.feature_map)
    return *grads, None, None, None, None


decay_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(decay_backward)


def _products(qkv: Tensor) -> tuple[int, int]:
    """FLOPs of one product of tokens with a state, and of one among the tokens of each chunk."""
    batch, tokens, _, heads, dim = qkv.shape
    flops = 2 * batch * tokens * heads * dim
    return flops * dim, flops * min(tokens, decay_chunk(qkv.dtype, dim))


# Two states are made, and both are read. Among the tokens of a chunk: weights, and their product
# with v.
@register_flop_formula(torch.ops.saga_kernels.decay_forward, get_raw=True)
def _forward_flops(qkv, *args, out_val=None, **kwargs) -> int:
    with_state, among_tokens = _products(qkv)
    return 4 * with_state + 2 * among_tokens


# Two states are made, and dq, dk and dv read two each. Among the tokens of a chunk: e twice,
# weights, dq, dk and dv.
@register_flop_formula(torch.ops.saga_kernels.decay_backward, get_raw=True)
def _backward_flops(grad, qkv, *args, out_val=None, **kwargs) -> int:
    with_state, among_tokens = _products(qkv)
    return 8 * with_state + 6 * among_tokens
