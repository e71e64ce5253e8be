"""Gated linear attention in eager PyTorch: the specification, the CPU path, and what exports see.

Legend: B batch, N tokens, H heads, D head dim.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..feature_maps import phi
from ..precision import outside_autocast
from ..slices import cut, join, token_slices

# S (B*H, D, D) and z (B*H, D, 1)
State = tuple[Tensor, Tensor]


def attend(packed: Tensor, feature_map: str, eps: float, mask: Tensor | None) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D), or q, k, v, a, b (B, N, 5, H, D) with gate
    logits.

    Half precision is computed in fp32, under autocast too. Without grad, tokens go through in
    slices: there is no temporary of the size of the input.
    """
    batch, tokens, _, heads, dim = packed.shape
    width = batch * heads * dim * max(packed.itemsize, 4)
    slices = token_slices(tokens, width, packed.device, with_grad=True)
    masks = [None] * len(slices) if mask is None else cut(mask, slices)
    # One unbind, so that the backward pass writes one packed gradient, instead of adding up five.
    parts = [piece.unbind(2) for piece in cut(packed, slices)]
    state = sum_states(
        kv_state(*others, feature_map=feature_map, mask=hidden)
        for (_, *others), hidden in zip(parts, masks, strict=True)
    )
    outs = (
        read_state(query, state, feature_map, eps, hidden)
        for (query, *_), hidden in zip(parts, masks, strict=True)
    )
    return join(outs, slices)


@outside_autocast
def kv_state(
    key: Tensor, value: Tensor, *gates: Tensor, feature_map: str, mask: Tensor | None
) -> State:
    """What some tokens add to the state: k, v and, if any, a, b, each (B, N, H, D)."""
    compute = torch.float64 if key.dtype == torch.float64 else torch.float32

    def gated(x: Tensor, index: int) -> Tensor:
        return x * gates[index].to(compute).sigmoid() if gates else x

    k = _per_head(gated(phi(key.to(compute), feature_map), 0), mask)
    v = _per_head(gated(value.to(compute), 1), mask)
    return k.transpose(1, 2) @ v, k.sum(1).unsqueeze(-1)


def sum_states(states: Iterable[State]) -> State:
    """The state of all tokens, from those of slices of them."""
    return functools.reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), states)


@outside_autocast
def read_state(
    query: Tensor, state: State, feature_map: str, eps: float = 1e-6, mask: Tensor | None = None
) -> Tensor:
    """Output (B, N, H, D) of the queries (B, N, H, D) of some tokens, from the state of all."""
    batch, tokens, heads, dim = query.shape
    sums, normalizer = state
    # A masked query has phi(q) = 0, so its output is 0 / eps = 0.
    q = _per_head(phi(query.to(sums.dtype), feature_map), mask)
    # eps keeps its place in the denominator, (B*H, N, 1), small beside a token tensor.
    out = (q @ sums) / (q @ normalizer + eps)
    return out.view(batch, heads, tokens, dim).transpose(1, 2).to(query.dtype)


def _per_head(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, N, H, D) -> (B*H, N, D), zero where masked."""
    batch, tokens, heads, dim = x.shape
    if mask is not None:
        x = x.masked_fill(~mask[:, :, None, None], 0)
    return x.transpose(1, 2).reshape(batch * heads, tokens, dim)
