"""Gradients for outputs that nobody uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _Join(torch.autograd.Function):
    """The identity of several tensors: if one of them gets a gradient, the others get zeros."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> tuple[Tensor, ...]:
        # not views, which could not be changed in place by a head
        ctx.mark_dirty(*tensors)
        return tensors

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


def join_gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors, of which each gets a gradient in the backward pass if one of them does.

    A neck need not use all outputs of a backbone: an FPN with `start_level=1` leaves out the first
    one. `DistributedDataParallel` would then wait for the gradient of its norm. Zeros end that, at
    the cost of a backward pass through that norm. They are made only where several processes train.

    Args:
        tensors: Results of operations, none of them a view.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    joined = [tensor for tensor in tensors if tensor.requires_grad]
    if not several or len(joined) < 2:
        return tuple(tensors)
    results = iter(_Join.apply(*joined))
    return tuple(next(results) if tensor.requires_grad else tensor for tensor in tensors)
