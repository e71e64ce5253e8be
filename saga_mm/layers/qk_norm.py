"""Normalisation of queries and keys. Legend: C channels, D = C / heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QKNorm(nn.Module):
    """Layer norm of q and k within each head, in a packed projection (..., parts * C) that starts
    with q and k; the rest is unchanged.

    Projections of a new model are so small that all scores of linear attention are nearly equal.
    With the norm, `gain` sets how much they differ. With a negative `bias`, ELU + 1 is close to an
    exponential function, which tells keys apart more sharply than a linear one.

    Args:
        dim: C.
        num_heads: Number of heads.
        gain: Initial factor of each channel.
        bias: Initial summand of each channel.
        eps: Added to the variance.

    Source: arXiv 2010.04245 and 2302.05442 normalise queries and keys of softmax attention. The
    bias is the project's choice.
    """

    def __init__(
        self, dim: int, num_heads: int, gain: float = 1.0, bias: float = 0.0, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.dim = dim
        self.head_dim = dim // num_heads
        self.eps = eps
        # one axis, as in other norms, to which no weight decay is applied
        self.weight = nn.Parameter(torch.full((2 * dim,), float(gain)))
        self.bias = nn.Parameter(torch.full((2 * dim,), float(bias)))

    def forward(self, projected: Tensor) -> Tensor:
        qk, rest = projected.split((2 * self.dim, projected.shape[-1] - 2 * self.dim), dim=-1)
        heads = qk.unflatten(-1, (-1, self.head_dim))
        normed = F.layer_norm(heads, (self.head_dim,), eps=self.eps).flatten(-2)
        qk = normed * self.weight + self.bias
        # under autocast, norms and their weights are float32
        return torch.cat([qk.to(projected.dtype), rest], dim=-1)

    def extra_repr(self) -> str:
        return f'head_dim={self.head_dim}'
