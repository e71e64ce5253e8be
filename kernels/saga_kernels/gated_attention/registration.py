"""The Triton kernels as a PyTorch op, which compilers, exports and FLOP counters see."""

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
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    num_heads: int,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    gamma: Tensor | None,
    mask: Tensor | None,
    feature_map: str,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """x plus the attention of its norm (B, H, W, C); the products are in the dtype of the weights
    of the linear layers."""
    lepe = None if lepe_weight is None or lepe_bias is None else (lepe_weight, lepe_bias)
    gate = None if gate_weight is None or gate_bias is None else (gate_weight, gate_bias)
    return kernels_of('gated_attention', x).forward(
        x, (norm_weight, norm_bias), (in_weight, in_bias), (out_weight, out_bias), num_heads, lepe,
        gate, gamma, None if mask is None else mask.flatten(1), feature_map == 'elu', eps, norm_eps,
        _dtype(x, in_weight, gamma),
    )  # fmt: skip


def _forward_fake(
    x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, num_heads, lepe_weight,
    lepe_bias, gate_weight, gate_bias, gamma, mask, feature_map, eps, norm_eps,
):  # fmt: skip
    return x.new_empty(x.shape, dtype=_dtype(x, in_weight, gamma))


def _dtype(x: Tensor, weight: Tensor, gamma: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)


_forward_op = register(
    'gated_attention_forward(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor in_weight,'
    ' Tensor in_bias, Tensor out_weight, Tensor out_bias, int num_heads, Tensor? lepe_weight,'
    ' Tensor? lepe_bias, Tensor? gate_weight, Tensor? gate_bias, Tensor? gamma, Tensor? mask,'
    ' str feature_map, float eps, float norm_eps) -> Tensor',
    _forward,
    _forward_fake,
)
gated_attention_forward = refuse_backward(_forward_op)


# The linear layers, the two products of the attention, and the convolution.
@register_flop_formula(torch.ops.saga_kernels.gated_attention_forward)
def _flops(
    x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, num_heads,
    lepe_weight=None, lepe_bias=None, gate_weight=None, *args, **kwargs,
):  # fmt: skip
    channels = x[-1]
    layers = in_weight[0] + out_weight[0] + (0 if gate_weight is None else gate_weight[0])
    taps = 0 if lepe_weight is None else math.prod(lepe_weight[2:])
    return 2 * math.prod(x) * (layers + 2 * channels // num_heads + taps)
