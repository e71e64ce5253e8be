"""How many directions a matrix really has: singular values, and ranks made of them."""

from __future__ import annotations

import torch
from torch import Tensor


def normalized_singular_values(matrix: Tensor) -> Tensor:
    """Singular values (..., min(M, N)) of matrices (..., M, N), divided by the largest.

    Those of a matrix of zeros are zero.
    """
    values = torch.linalg.svdvals(matrix)
    return values / values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)


def effective_rank(values: Tensor) -> Tensor:
    """exp of the entropy of singular values (..., R) that are divided by their sum: (...).

    From 1, where one direction holds everything, to R, where all are alike; 1 for zeros.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def numerical_rank(values: Tensor, tolerance: float = 0.01) -> Tensor:
    """Number of singular values (..., R) above `tolerance` times the largest: (...)."""
    return (values > tolerance * values.amax(-1, keepdim=True)).sum(-1)


def summarize(matrices: Tensor) -> dict[str, object]:
    """Medians over many matrices of one kind, (..., M, N), as plain numbers.

    Returns:
        singular_values (min(M, N) of them, each the median over the matrices), effective_rank,
        numerical_rank (at 1 %) and full_rank.
    """
    values = normalized_singular_values(matrices).flatten(0, -2)
    return dict(
        singular_values=values.quantile(0.5, 0).tolist(),
        effective_rank=effective_rank(values).quantile(0.5).item(),
        numerical_rank=numerical_rank(values).double().quantile(0.5).item(),
        full_rank=values.shape[-1],
    )
