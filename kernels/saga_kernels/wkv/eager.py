"""Bidirectional WKV as PyTorch runs it without recording it, as on a CPU.

A state stands for the tokens on one side of a place: their largest exponent `top` there, and the
sums of exp(exponent - top) v and of exp(exponent - top). It passes a token by a decay of w and by
taking that token in. The exponents of a state are never larger than its `top`: nothing overflows.

GROUP elements of a level (tokens, groups of tokens, groups of groups) are summed up into one of the
next, and the states before each group come back from there. What the top level holds, N / GROUP^3
elements, meets in a triangular matrix per channel. So the steps that follow each other are GROUP
per level, whatever N is, and each takes all groups at once. That is O(N) but for the matrix, which
has 65,536 entries per channel for 2^20 tokens.

Differences of exponents are taken before the decay is: a `top` that was rounded costs nothing, as
the sums follow it exactly. No gradient passes through it, as it cancels.

Where autograd keeps nothing, a CPU works on blocks of channels. Where it can see that the keys of
each channel are close to each other, as they are in most models, there is a shorter way: `bounded`.

Legend: B batch, N elements of a level, C channels, G groups, L = GROUP.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ceil_div, chunk_length
from ..precision import compute_dtype, outside_autocast
from . import bounded

# Elements per group, and how often they are grouped.
GROUP = 16
LEVELS = 3
# Fewest channels of a block: a cache line of float32.
CHANNELS = 16
# Exponent of no token at all. Finite, for the difference of two infinities is not a number.
EMPTY = -1e30


class State(NamedTuple):
    """Weighted sums, of the shape (B, ..., C) each; `top` has no gradient."""

    top: Tensor
    numerator: Tensor
    denominator: Tensor


@outside_autocast
def attend(k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None) -> Tensor:
    """`reference.attend` in O(N) time and memory."""
    compute = compute_dtype(k)
    w, u = w.to(compute), u.to(compute)
    if mask is None:
        return _attend(k, v, w, u, None)
    k, v, live, place = live_first(k, v, mask)
    return take_back(_attend(k, v, w, u, live), place, mask)


def live_first(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move masked tokens behind the others, where they lie between none.

    Returns:
        k and v, zero where masked; the mask in that order; and the new place (B, N) of each token.
    """
    masked = ~mask[:, :, None]
    order = (~mask).to(torch.uint8).argsort(stable=True, dim=1)
    k, v = (x.masked_fill(masked, 0).gather(1, order[:, :, None].expand(x.shape)) for x in (k, v))
    return k, v, mask.gather(1, order), (mask.long().cumsum(1) - 1).clamp(min=0)


def take_back(out: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Undo `live_first` for an output (B, N, C), which is zero where masked."""
    return out.gather(1, place[:, :, None].expand(out.shape)).masked_fill(~mask[:, :, None], 0)


def _attend(k: Tensor, v: Tensor, w: Tensor, u: Tensor, live: Tensor | None) -> Tensor:
    """As `attend`, where masked tokens, if there are any, stand behind all others."""
    top = bounded.top_if_bounded(k, u, live)
    if top is not None:
        return bounded.attend(k, v, w, u, live, top)
    # No channel depends on another: a CPU takes as many at a time as let two tensors of a step lie
    # in its cache.
    width = chunk_length(k.mT, 2 * k.shape[0] * (k.shape[1] // GROUP) * w.itemsize)
    if width is None or k.shape[2] <= CHANNELS:
        return _attend_channels(k, v, w, u, live)
    parts = (x.split(max(width, CHANNELS), -1) for x in (k, v, w, u))
    blocks = zip(*parts, strict=True)
    outs = [_attend_channels(k, v, w, u, live) for k, v, w, u in blocks]
    return torch.cat(outs, -1)


def _attend_channels(k: Tensor, v: Tensor, w: Tensor, u: Tensor, live: Tensor | None) -> Tensor:
    dtype, tokens = v.dtype, k.shape[1]
    k, v = k.to(w.dtype), v.to(w.dtype)
    if live is not None:
        k = k.masked_fill(~live[:, :, None], EMPTY)
    k, v = (_grouped(k, EMPTY), _grouped(v, 0))
    rate, bonus = w[:, None], u[:, None]

    elements = [(k[:, :, i], v[:, :, i]) for i in range(GROUP)]
    before = _walk(k, v, None, rate, True, LEVELS - 1)
    after = _walk(k, v, None, rate, False, LEVELS - 1)
    means = [
        _mean(x, y, key, value, bonus)
        for x, y, (key, value) in zip(before, after, elements, strict=True)
    ]
    return torch.stack(means, 2).flatten(1, 2)[:, :tokens].to(dtype)


def _grouped(x: Tensor, fill: float) -> Tensor:
    """(B, N, C) -> (B, G, L, C), the last groups filled up."""
    groups = max(ceil_div(x.shape[1], GROUP), 1)
    x = F.pad(x, (0, 0, 0, groups * GROUP - x.shape[1]), value=fill)
    return x.unflatten(1, (groups, GROUP))


def _mean(before: State, after: State, k: Tensor, v: Tensor, bonus: Tensor) -> Tensor:
    """The weighted mean of a token and all others."""
    top = torch.maximum(torch.maximum(before.top, after.top), k + bonus).detach()
    x, y, z = (before.top - top).exp(), (after.top - top).exp(), (k - top + bonus).exp()
    numerator = x * before.numerator + y * after.numerator + z * v
    return numerator / (x * before.denominator + y * after.denominator + z)


def _walk(
    exponent: Tensor,
    numerator: Tensor,
    denominator: Tensor | None,
    rate: Tensor,
    forward: bool,
    levels: int,
) -> list[State]:
    """State on one side of each element of a group, itself left out.

    Args:
        exponent: (B, G, L, C), may require a gradient if the elements are tokens.
        numerator: (B, G, L, C).
        denominator: Likewise, or None for ones, which tokens have.
        rate: Decay per element, (B, 1, C).
        forward: Whether of the elements before, else after.
        levels: How often groups are to be grouped again.
    """
    total = _sum_of_groups(exponent, numerator, denominator, rate, forward)
    state = _states_of(total, rate * GROUP, forward, levels)
    states = []
    for i in range(GROUP) if forward else reversed(range(GROUP)):
        states.append(state)
        one = None if denominator is None else denominator[:, :, i]
        state = _pass(state, rate, exponent[:, :, i], numerator[:, :, i], one)
    return states if forward else states[::-1]


def _pass(
    state: State, rate: Tensor, exponent: Tensor, numerator: Tensor, denominator: Tensor | None
) -> State:
    """The state one element further on, that element taken in."""
    top = torch.maximum(state.top - rate, exponent).detach()
    old, new = (state.top - top - rate).exp(), (exponent - top).exp()
    added = new if denominator is None else new * denominator
    return State(top, old * state.numerator + new * numerator, old * state.denominator + added)


def _sum_of_groups(
    exponent: Tensor, numerator: Tensor, denominator: Tensor | None, rate: Tensor, forward: bool
) -> State:
    """What each group adds to the state behind it: (B, G, L, C) -> (B, G, C)."""
    passed = torch.arange(GROUP, dtype=rate.dtype, device=rate.device)
    if forward:
        passed = GROUP - 1 - passed
    # (B, 1, L, C)
    decay = (passed[:, None] * rate)[:, None]
    top = (exponent - decay).amax(2, keepdim=True).detach()
    weight = (exponent - top - decay).exp()
    weights = weight if denominator is None else weight * denominator
    return State(top.squeeze(2), (weight * numerator).sum(2), weights.sum(2))


def _states_of(elements: State, rate: Tensor, forward: bool, levels: int) -> State:
    """State on one side of each element (B, N, C)."""
    if levels == 0:
        return _states_by_matrix(elements, rate, forward)
    count = elements.top.shape[1]
    top, *sums = elements
    numerator, denominator = (_grouped(x, 0) for x in sums)
    states = _walk(_grouped(top, EMPTY), numerator, denominator, rate, forward, levels - 1)
    return State(*(torch.stack(x, 2).flatten(1, 2)[:, :count] for x in zip(*states, strict=True)))


def _states_by_matrix(elements: State, rate: Tensor, forward: bool) -> State:
    """State on one side of each element (B, N, C), by all pairs."""
    here = torch.arange(elements.top.shape[1], dtype=rate.dtype, device=rate.device)
    passed = here[:, None] - here - 1 if forward else here - here[:, None] - 1
    # (N, N, 1) and (B, N, N, C): axis 1 is where the state stands.
    counts = passed.unsqueeze(2) >= 0
    decay = passed.clamp(min=0).unsqueeze(2) * rate.unsqueeze(1)
    top = torch.where(counts, elements.top[:, None] - decay, EMPTY).amax(2).detach()
    weight = torch.where(counts, elements.top[:, None] - top[:, :, None] - decay, EMPTY).exp()
    return State(
        top,
        (weight * elements.numerator[:, None]).sum(2),
        (weight * elements.denominator[:, None]).sum(2),
    )
