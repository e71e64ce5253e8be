"""Rank-augmented linear attention in eager PyTorch: the specification, the CPU path, and what
exports see.

Legend: B batch, N tokens, H heads, D head dim.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..feature_maps import phi
from ..precision import outside_autocast
from ..slices import cut, join, token_slices


@outside_autocast
def attend(
    qkv: Tensor, size: tuple[int, int], frequencies: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D) of an image of (height, width) = size tokens.

    Half precision is computed in fp32, under autocast too. Without grad, tokens go through in
    slices: besides the rotation's table, which images and heads share, there is no temporary of the
    size of the input.
    """
    batch, tokens, _, heads, dim = qkv.shape
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    slices = token_slices(tokens, batch * heads * dim * compute.itemsize, qkv.device)
    masks = [None] * len(slices) if mask is None else cut(mask, slices)
    # One unbind, so that the backward pass writes one packed gradient instead of adding up three.
    query, key, value = (cut(x, slices) for x in qkv.unbind(2))

    def features(pieces: Sequence[Tensor]) -> Callable[[], Iterable[Tensor]]:
        # Needed twice: kept where there is one, and made again where there are several.
        def make() -> Iterator[Tensor]:
            for x, hidden in zip(pieces, masks, strict=True):
                yield _per_head(phi(x.to(compute), 'elu'), hidden)

        kept = list(make()) if len(pieces) == 1 else None
        return make if kept is None else lambda: kept

    queries, keys = features(query), features(key)
    total = functools.reduce(torch.add, (q.sum(2) for q in queries()))
    mean = _mean_query(total, tokens, mask)
    weights = _softmax(torch.cat([k @ mean for k in keys()], 2), mask)
    turns = [cut(x, slices, 0) for x in _rotation(size, frequencies.to(compute))]
    states = [
        _state(k * weight, _per_head(v.to(compute), hidden), cos, sin)
        for k, weight, v, hidden, cos, sin in zip(
            keys(), cut(weights, slices, 2), value, masks, *turns, strict=True
        )
    ]
    state, normalizer = (functools.reduce(torch.add, x) for x in zip(*states, strict=True))
    outs = (
        _out(q, state, normalizer, cos, sin, eps).to(qkv.dtype)
        for q, cos, sin in zip(queries(), *turns, strict=True)
    )
    return join(outs, slices)


def _state(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """S (B, H, D, D) and z (B, H, D, 1) of weighted keys and values, each (B, H, N, D)."""
    return _rotate(k, cos, sin).transpose(2, 3) @ v, k.sum(2).unsqueeze(-1)


def _out(
    q: Tensor, state: Tensor, normalizer: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """Output (B, N, H, D) of phi(q), (B, H, N, D)."""
    # A masked query has phi(q) = 0, so its output is 0 / eps = 0.
    return (_rotate(q, cos, sin) @ state / (q @ normalizer + eps)).transpose(1, 2)


def _per_head(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, H, D) -> (B, H, N, D), zero where masked."""
    x = x.transpose(1, 2)
    return x.contiguous() if mask is None else x.masked_fill(~mask[:, None, :, None], 0)


def _mean_query(total: Tensor, tokens: int, mask: Tensor | None) -> Tensor:
    """Mean over tokens, scaled as in softmax attention: their sum (B, H, D) -> (B, H, D, 1)."""
    count = tokens if mask is None else mask.sum(1).clamp(min=1)[:, None, None]
    return (total / count * total.shape[-1] ** -0.5).unsqueeze(-1)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over tokens of (B, H, N, 1); finite where every token is masked."""
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :, None], torch.finfo(logits.dtype).min)
    return logits.softmax(2)


def _rotation(size: tuple[int, int], frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (N, D / 2): the first half turns with the row, the second with the column."""
    rows, columns = (
        torch.arange(length, dtype=frequencies.dtype, device=frequencies.device) for length in size
    )
    # (height, 1, D / 4) and (width, D / 4) -> (N, D / 2)
    angles = rows[:, None, None] * frequencies, columns[:, None] * frequencies
    angles = torch.cat(torch.broadcast_tensors(*angles), -1).flatten(0, 1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of (B, H, N, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)
