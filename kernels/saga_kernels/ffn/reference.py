"""A feed-forward network as PyTorch runs it: the specification, and what CPUs and exports use."""

import torch.nn.functional as F
from torch import Tensor


def feed_forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
    gamma: Tensor | None,
    eps: float,
) -> Tensor:
    """`ffn` in plain PyTorch."""
    y = F.layer_norm(x, norm[0].shape, *norm, eps)
    y = F.linear(F.gelu(F.linear(y, *fc1)), *fc2)
    return x + (y if gamma is None else y * gamma)
