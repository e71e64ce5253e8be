"""Layer norm over channels as PyTorch runs it: the specification, and what CPUs and exports use."""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    """`layer_norm` in plain PyTorch."""
    out = F.layer_norm(x, weight.shape, weight, bias, eps)
    return out if dtype is None else out.to(dtype)
