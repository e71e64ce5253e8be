"""The Triton kernels as PyTorch ops, which autograd, compilers, exports and FLOP counters see.

Autocast does not change the ops: they keep the dtype of the input, and sums are fp32 in every
dtype, as in the implementation in PyTorch.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import kernels_of
from ..registration import refuse_double_backward, register, register_autograd


def _forward(
    packed: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> tuple[Tensor, Tensor]:
    """Output (B, N, H, D) and fp32 state (B, H, D + 1, D) of packed (B, N, 3 or 5, H, D)."""
    return kernels_of('gated', packed).forward(packed, mask, feature_map == 'elu', eps)


def _backward(
    grad: Tensor, packed: Tensor, state: Tensor, mask: Tensor | None, feature_map: str, eps: float
) -> Tensor:
    """Gradient of the packed projection: one tensor, since an op must not return views of one."""
    return kernels_of('gated', packed).backward(
        grad, packed, state, mask, feature_map == 'elu', eps
    )


def _forward_fake(packed, mask, feature_map, eps):
    batch, tokens, _, heads, dim = packed.shape
    out = packed.new_empty((batch, tokens, heads, dim))
    return out, packed.new_empty((batch, heads, dim + 1, dim), dtype=torch.float32)


def _backward_fake(grad, packed, state, mask, feature_map, eps):
    return torch.empty_like(packed, memory_format=torch.contiguous_format)


_forward_op = register(
    'gated_forward(Tensor packed, Tensor? mask, str feature_map, float eps) -> (Tensor, Tensor)',
    _forward,
    _forward_fake,
)
gated_backward = register(
    'gated_backward(Tensor grad, Tensor packed, Tensor state, Tensor? mask, str feature_map,'
    ' float eps) -> Tensor',
    _backward,
    _backward_fake,
)


def _save(ctx, inputs, output):
    packed, mask, ctx.feature_map, ctx.eps = inputs
    state = output[1]
    ctx.save_for_backward(packed, state, mask)
    ctx.mark_non_differentiable(state)


def _differentiate(ctx, grad, _):
    packed, state, mask = ctx.saved_tensors
    grad = gated_backward(grad, packed, state, mask, ctx.feature_map, ctx.eps)
    return grad, None, None, None


gated_forward = register_autograd(_forward_op, _save, _differentiate)
refuse_double_backward(gated_backward)


# Products of (N x D) and (D x D) matrices. Forward: S and o. Backward: t, G, dk and dv.
@register_flop_formula(torch.ops.saga_kernels.gated_forward)
def _forward_flops(packed_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, _, heads, dim = packed_shape
    return 2 * 2 * batch * tokens * heads * dim**2


@register_flop_formula(torch.ops.saga_kernels.gated_backward)
def _backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    batch, tokens, heads, dim = grad_shape
    return 4 * 2 * batch * tokens * heads * dim**2
