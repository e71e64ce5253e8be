"""The Triton kernel as a PyTorch op, which compilers, exports and FLOP counters see."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import kernels_of
from ..registration import refuse_backward, register


def _forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    gamma: Tensor | None,
    eps: float,
) -> Tensor:
    """x plus the FFN of its norm (..., C); the products are in the dtype of the two weights."""
    norm, fc1, fc2 = (norm_weight, norm_bias), (weight1, bias1), (weight2, bias2)
    return kernels_of('ffn', x).forward(x, norm, fc1, fc2, gamma, eps, _dtype(x, weight1, gamma))


def _forward_fake(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, gamma, eps):
    return x.new_empty(x.shape, dtype=_dtype(x, weight1, gamma))


def _dtype(x: Tensor, weight: Tensor, gamma: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


_forward_op = register(
    'ffn_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1,'
    ' Tensor weight2, Tensor bias2, Tensor? gamma, float eps) -> Tensor',
    _forward,
    _forward_fake,
)
ffn_forward = refuse_backward(_forward_op)


@register_flop_formula(torch.ops.saga_kernels.ffn_forward)
def _flops(x, norm_weight, norm_bias, weight1, *args, **kwargs):
    return 4 * math.prod(x) * weight1[0]
