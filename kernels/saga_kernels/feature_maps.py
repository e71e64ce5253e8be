"""Feature maps of the eager implementations: functions of a tensor, non-negative everywhere.

Each is zero at minus infinity, which is how masked keys are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_tracing_or_compiling

FeatureMap = str | Callable[[Tensor], Tensor]


def phi(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """`'elu'`: ELU(x) + 1. `'relu'`: ReLU(x). Or any function, applied to x."""
    if callable(feature_map):
        return feature_map(x)
    return F.relu(x) if feature_map == 'relu' else elu_plus_one(x)


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1 in plain operators."""
    # exp(x) where x <= 0: ELU(x) + 1 = (exp(x) - 1) + 1 would lose small values.
    return F.relu(x) + x.clamp(max=0).exp()


def with_lean_gradient(feature_map: FeatureMap) -> FeatureMap:
    """The same feature map, for which autograd keeps nothing but the result where it runs eagerly.

    What is traced or compiled stays in plain operators.
    """
    return (
        _EluPlusOne.apply if feature_map == 'elu' and not is_tracing_or_compiling() else feature_map
    )


class _EluPlusOne(torch.autograd.Function):
    """ELU(x) + 1, whose derivative is the smaller of its result and 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return elu_plus_one(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return grad * out.clamp(max=1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return tangent * out.clamp(max=1)
