"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see.

Autocast does not change the ops: they keep the dtype of the input, and sums are fp32 in every
dtype, as in the implementation in PyTorch.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import kernels_of
from ..registration import refuse_double_backward, register, register_autograd
from ..rotary import table_shape


def _forward(
    qkv: Tensor, frequencies: Tensor, mask: Tensor | None, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (B, N, H, D) of qkv (B, N, 3, H, D), and what its gradient needs, in fp32: the table
    of the rotation (width + height, 2, D / 4), the state (B, H, D + 1, D), the mean query
    (B, H, D) and the logarithm of the sum of weights (B, H)."""
    return kernels_of('rank_augmented', qkv).forward(qkv, frequencies, mask, width, eps)


def _backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    state: Tensor,
    query: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    width: int,
    eps: float,
) -> Tensor:
    """Gradient of the packed projection: one tensor, since an op must not return views of one."""
    return kernels_of('rank_augmented', qkv).backward(
        grad, qkv, table, state, query, weight, mask, width, eps
    )


def _forward_fake(qkv, frequencies, mask, width, eps):
    batch, tokens, _, heads, dim = qkv.shape
    shapes = (
        table_shape(tokens, width, dim),
        (batch, heads, dim + 1, dim),
        (batch, heads, dim),
        (batch, heads),
    )
    kept = (qkv.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return qkv.new_empty((batch, tokens, heads, dim)), *kept


def _backward_fake(grad, qkv, table, state, query, weight, mask, width, eps):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_forward_op = register(
    'rank_augmented_forward(Tensor qkv, Tensor frequencies, Tensor? mask, SymInt width, float eps)'
    ' -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _forward,
    _forward_fake,
)
rank_augmented_backward = register(
    'rank_augmented_backward(Tensor grad, Tensor qkv, Tensor table, Tensor state,'
    ' Tensor query, Tensor weight, Tensor? mask, SymInt width, float eps) -> Tensor',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    qkv, _, mask, ctx.width, ctx.eps = inputs
    _, *kept = output
    ctx.save_for_backward(qkv, *kept, mask)
    ctx.mark_non_differentiable(*kept)


def _differentiate(ctx, grad, *_):
    grad = rank_augmented_backward(grad, *ctx.saved_tensors, ctx.width, ctx.eps)
    return grad, None, None, None, None


rank_augmented_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(rank_augmented_backward)


# Products of (N x D) and (D x D) matrices. Forward: S and o. Backward: t, dS, dk, dv, and t again
# for dq.
@register_flop_formula(torch.ops.saga_kernels.rank_augmented_forward)
def _forward_flops(qkv_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, _, heads, dim = qkv_shape
    return 2 * 2 * batch * tokens * heads * dim**2


@register_flop_formula(torch.ops.saga_kernels.rank_augmented_backward)
def _backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, heads, dim = grad_shape
    return 5 * 2 * batch * tokens * heads * dim**2
