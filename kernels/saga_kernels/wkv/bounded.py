"""Bidirectional WKV where the weights of a channel are numbers of similar size.

Every weight is taken relative to the largest one of its channel. Sums then need no running maximum:
a step to the next token is one multiplication and one addition.

GROUP tokens are summed up into an element of the next level, and the sums before and after each
group come back from there. So there are GROUP steps per level, whatever N is, and each step takes
all groups at once.

Legend: B batch, N tokens or elements of a level, C channels, G groups, L = GROUP. An element is
(B, 2 C): the weighted values, and their weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ceil_div, chunk_length
from ..precision import compute_dtype
from ..tracing import is_tracing_or_compiling
from ..validation import has_values

GROUP = 16
# Largest difference between the keys of a channel. The square of the smallest denominator, which
# second derivatives divide by, is a normal number of float32.
SPREAD = 40.0
# Largest bonus. A sum of weights stays in the middle of the range of float32.
BONUS = 20.0


def top_if_bounded(k: Tensor, u: Tensor, live: Tensor | None) -> Tensor | None:
    """The largest key of each channel (B, 1, C), if `attend` holds for these keys; else None.

    This looks at values, so it says None where that would cost time or fix a branch in a graph.

    Args:
        k: (B, N, C).
        u: Bonus per token, (B, C) or (1, C).
        live: (B, N) bool, or None for all tokens.
    """
    if is_tracing_or_compiling() or not (has_values(k) and has_values(u)) or k.numel() == 0:
        return None
    k, u = k.detach(), u.detach()
    low = high = k
    if live is not None:
        low, high = (k.masked_fill(~live[:, :, None], x) for x in (torch.inf, -torch.inf))
    top, bottom = (x.to(compute_dtype(k)) for x in (high.amax(1, True), low.amin(1, True)))
    # The range of no token at all is minus infinity. NaN compares as False.
    bounded = (top - bottom <= SPREAD).all() & (u.abs() <= BONUS).all()
    return top.clamp(min=torch.finfo(top.dtype).min) if bool(bounded) else None


def attend(k: Tensor, v: Tensor, w: Tensor, u: Tensor, live: Tensor | None, top: Tensor) -> Tensor:
    """`reference.attend` in O(N) time and memory.

    Args:
        k, v: (B, N, C).
        w, u: Decay and bonus per token, (B, C) or (1, C), in the dtype to compute in.
        live: (B, N) bool, or None: the tokens that count, which stand before all others.
        top: The largest key of each channel, (B, 1, C).
    """
    dtype, (batch, tokens, channels) = v.dtype, k.shape
    rate, bonus = (torch.cat([x, x], 1)[:, None] for x in (w, u))
    decay, bonus = (-rate).exp(), bonus.exp()
    length = chunk_length(k, 2 * batch * channels * top.itemsize) or tokens
    length = ceil_div(length, GROUP) * GROUP
    masks = [None] * ceil_div(tokens, length) if live is None else live.split(length, 1)
    chunks = list(zip(k.split(length, 1), v.split(length, 1), masks, strict=True))

    totals = []
    for chunk in chunks:
        x = _elements(*chunk, top)
        totals.append([_total(x, decay, reverse) for reverse in (False, True)])
    before, after = (
        _sums_before(torch.cat(x, 1), GROUP * rate, reverse).split(length // GROUP, 1)
        for x, reverse in zip(zip(*totals, strict=True), (False, True), strict=True)
    )
    outs = []
    for chunk, *sums in zip(chunks, before, after, strict=True):
        x = _elements(*chunk, top)
        sides = (
            _walk(x, decay, y, reverse) for y, reverse in zip(sums, (False, True), strict=True)
        )
        sums = [
            torch.addcmul(earlier + later, x[:, :, i], bonus)
            for i, (earlier, later) in enumerate(zip(*sides, strict=True))
        ]
        outs.append(_mean(torch.stack(sums, 2).flatten(1, 2), *chunk[1:]).to(dtype))
    return torch.cat(outs, 1)


def _elements(k: Tensor, v: Tensor, live: Tensor | None, top: Tensor) -> Tensor:
    """The elements that tokens are, in groups: (B, G, L, 2 C)."""
    exponent = k.to(top.dtype) - top
    if live is not None:
        exponent = exponent.masked_fill(~live[:, :, None], -torch.inf)
    weight = exponent.exp()
    return _grouped(torch.cat([weight * v.to(top.dtype), weight], 2))


def _mean(sums: Tensor, v: Tensor, live: Tensor | None) -> Tensor:
    """The weighted mean at each token, (B, N, C), of sums (B, N or more, 2 C)."""
    numerator, denominator = sums[:, : v.shape[1]].chunk(2, 2)
    if live is not None:
        # No gradient of 0 / 0 behind the last token that counts.
        denominator = denominator.masked_fill(~live[:, :, None], 1)
    return numerator / denominator


def _grouped(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, G, L, C), the last group filled up with zeros."""
    groups = ceil_div(x.shape[1], GROUP)
    missing = groups * GROUP - x.shape[1]
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(1, (groups, GROUP))


def _total(x: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    """What each group adds to the sum behind it, or before it if reversed: (B, G, C)."""
    first, *others = reversed(x.unbind(2)) if reverse else x.unbind(2)
    for element in others:
        first = torch.addcmul(element, first, decay)
    return first


def _walk(x: Tensor, decay: Tensor, total: Tensor, reverse: bool) -> list[Tensor]:
    """The sum before each element of a group, or after it if reversed: L of (B, G, C).

    Args:
        x: (B, G, L, C).
        decay: Factor per element, (B, 1, C) or (1, 1, C).
        total: The sum before each group, (B, G, C).
        reverse: Whether sums are of the elements after.
    """
    sums = []
    for element in reversed(x.unbind(2)) if reverse else x.unbind(2):
        sums.append(total)
        total = torch.addcmul(element, total, decay)
    return sums[::-1] if reverse else sums


def _sums_before(x: Tensor, rate: Tensor, reverse: bool) -> Tensor:
    """The sum before each element (B, N, C), or after it if reversed."""
    decay = (-rate).exp()
    if x.shape[1] <= 2 * GROUP:
        group = x[:, None]
        return torch.cat(_walk(group, decay, torch.zeros_like(group[:, :, 0]), reverse), 1)
    groups = _grouped(x)
    totals = _sums_before(_total(groups, decay, reverse), GROUP * rate, reverse)
    return torch.stack(_walk(groups, decay, totals, reverse), 2).flatten(1, 2)[:, : x.shape[1]]
