"""Measures ranks of matrices by their singular values."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .mixing import Mixing, attention_layers, label, record_inputs, take_apart


def normalized_singular_values(matrix: Tensor) -> Tensor:
    """Singular values (..., min(M, N)) of matrices (..., M, N), divided by the largest.

    Those of a matrix of zeros are zero.
    """
    values = torch.linalg.svdvals(matrix)
    return values / values[..., :1].clamp(min=torch.finfo(values.dtype).tiny)


def effective_rank(values: Tensor) -> Tensor:
    """Exp of the entropy of singular values (..., R) as shares of their sum: (...).

    It is 1 if a single singular value is not zero, R if all are equal, and 1 for zeros.

    Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
    """
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp()


def numerical_rank(values: Tensor, tolerance: float = 0.01) -> Tensor:
    """Number of singular values (..., R) above `tolerance` times the largest: (...)."""
    return (values > tolerance * values.amax(-1, keepdim=True)).sum(-1)


def summarize(values: Tensor) -> dict[str, object]:
    """Summarise the singular values (matrices, R) of several matrices by medians.

    Returns:
        `singular_values` (R numbers), `effective_rank`, `numerical_rank` (at 1 %), `full_rank` (R).
    """
    return dict(
        singular_values=values.quantile(0.5, 0).tolist(),
        effective_rank=effective_rank(values).quantile(0.5).item(),
        numerical_rank=numerical_rank(values).double().quantile(0.5).item(),
        full_rank=values.shape[-1],
    )


def effective_tokens(mixing: Mixing, queries: int = 16) -> float:
    """How many tokens a token attends to: exp of the entropy of the absolute values of its weights
    as shares of their sum. The mean over images, heads, and some tokens at equal distances."""
    number = mixing.features['output'].shape[1]
    picked = torch.linspace(0, number - 1, min(number, queries)).round().long().unique().tolist()
    rows = torch.stack([mixing.row(token) for token in picked])
    return effective_rank(rows.abs()).mean().item()


def layer_ranks(backbone: nn.Module, images: Iterable[Tensor]) -> dict[str, dict]:
    """Measure ranks of the states and features of the attention layers of a backbone.

    Args:
        backbone: In eval mode.
        images: (B, 3, H, W) each, all of one size.

    Returns:
        For each layer, by its `label`: the `mechanism`; `matrices`, with the result of `summarize`
        over all images and heads for each matrix of `Mixing`; `gates`, with the mean and the
        standard deviation over tokens, averaged over images, heads and channels; and `tokens`, with
        the mean of `effective_tokens` over images, and their full number.
    """
    modules = attention_layers(backbone)
    mechanisms: dict[str, str] = {}
    values: dict[str, dict[str, list[Tensor]]] = {name: {} for name in modules}
    gates: dict[str, dict[str, list[Tensor]]] = {name: {} for name in modules}
    tokens: dict[str, list[float]] = {name: [] for name in modules}
    full: dict[str, int] = {}
    for image in images:
        for name, x in record_inputs(backbone, image).items():
            mixing = take_apart(modules[name], x)
            mechanisms[name] = mixing.mechanism
            tokens[name].append(effective_tokens(mixing))
            full[name] = mixing.features['output'].shape[1]
            for kind, matrix in {**mixing.states, **mixing.features}.items():
                spectrum = normalized_singular_values(matrix).flatten(0, -2).cpu()
                values[name].setdefault(kind, []).append(spectrum)
            for kind, gate in mixing.gates.items():
                spread = torch.stack([gate.mean(), gate.std(2).mean()])
                gates[name].setdefault(kind, []).append(spread)
    return {
        label(name): dict(
            mechanism=mechanisms[name],
            matrices={kind: summarize(torch.cat(parts)) for kind, parts in kinds.items()},
            gates={
                kind: torch.stack(parts).mean(0).tolist() for kind, parts in gates[name].items()
            },
            tokens=[statistics.fmean(tokens[name]), full[name]],
        )
        for name, kinds in values.items()
    }
