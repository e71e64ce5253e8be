"""Bidirectional WKV for graphs that are compiled or exported, which may run in float16 throughout.

A state stands for the tokens on one side of a place: the logarithm of the sum of their weights
there, and their weighted mean. Both have the scale of the keys and values, whatever N is. States
are merged in pairs: by powers of two within groups of tokens, then by powers of two over groups.
That takes a fixed number of operators, about 500, for any N up to 2^22, and O(N) time.

Exponents are exact for keys from -1e4 to 1e4. An empty state is EMPTY there, and a decay of FAR
leaves nothing of a state, so that no difference of exponents is too large for float16.

Legend: B batch, N tokens, C channels, G groups, L = GROUP tokens; the first axis of (2, ...) is the
direction: tokens before a place, and tokens after it, which are in reverse order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ceil_div
from ..precision import compute_dtype, outside_autocast
from ..validation import DecayPer
from .eager import live_first, take_back

GROUP = 16
# Powers of two of groups, for up to GROUP * 2^18 = 2^22 tokens.
LEVELS = 18
EMPTY = -3e4
FAR = 3e4

State = tuple[Tensor, Tensor]


@outside_autocast
def attend(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, decay_per: DecayPer, mask: Tensor | None
) -> Tensor:
    """`bidirectional_wkv`, for arguments that have been checked."""
    compute, dtype, tokens = compute_dtype(k), v.dtype, k.shape[1]
    if mask is None:
        live = place = k.new_ones((1, tokens), dtype=torch.bool)
    else:
        k, v, live, place = live_first(k, v, mask)
    k, v, w, u = (x.to(compute) for x in (k, v, w, u))
    k = k.masked_fill(~live[:, :, None], EMPTY)
    # One group more than needed: torch.export fixes an axis of length one for good.
    groups = ceil_div(tokens, GROUP) + 1
    missing = groups * GROUP - tokens
    k, v = F.pad(k, (0, 0, 0, missing), value=EMPTY), F.pad(v, (0, 0, 0, missing))
    # (2, B, G, L, C)
    element = tuple(torch.stack((x, x.flip(1))).unflatten(2, (groups, GROUP)) for x in (k, v))

    # Decay per group and per token, and the bonus: (B, 1, C). As a mean, the number of tokens that
    # count is not too large for float16.
    if decay_per == 'image':
        share = F.pad(live.to(compute), (0, missing)).unflatten(1, (groups, GROUP)).mean(2).mean(1)
        share = share.clamp(min=1e-7)[:, None, None]
        per_group, bonus = w / share / groups, u / share / groups / GROUP
    else:
        per_group, bonus = (w * GROUP).expand(1, 1, -1), u
    rate = (per_group / GROUP).unsqueeze(2)

    # Each place gets the state of those tokens of its group that are behind it.
    inside = shifted(element, 1, 3)
    for step in (1, 2, 4, 8):
        inside = merged(inside, shifted(inside, step, 3), rate * step)
    last, behind = (tuple(x[:, :, :, -1] for x in state) for state in (element, inside))
    outside = shifted(merged(last, behind, rate[:, 0]), 1, 2)
    decay = per_group
    for level in range(LEVELS):
        outside = merged(outside, shifted(outside, 2**level, 2), decay)
        decay = (decay * 2).clamp(max=FAR)
    passed = torch.arange(GROUP, dtype=rate.dtype, device=rate.device)[:, None]
    log, mean = outside
    state = merged(inside, (log.unsqueeze(3), mean.unsqueeze(3)), rate * passed)

    log, mean = (x.flatten(2, 3) for x in state)
    none = torch.zeros_like(per_group)
    others = merged((log[0], mean[0]), (log[1].flip(1), mean[1].flip(1)), none)
    out = merged(others, (k + bonus, v), none)[1][:, :tokens].to(dtype)
    return out if mask is None else take_back(out, place, mask)


def shifted(state: State, step: int, axis: int) -> State:
    """The states `step` places before each place; empty ones where there is no such place."""
    log, mean = state
    sizes = [0] * (2 * (log.ndim - 1 - axis)) + [step, 0]
    length = log.shape[axis]
    return (
        F.pad(log, sizes, value=EMPTY).narrow(axis, 0, length),
        F.pad(mean, sizes).narrow(axis, 0, length),
    )


def merged(a: State, b: State, decay: Tensor) -> State:
    """The state of the tokens of two states, of which the weights of `b` have yet to decay."""
    decay = decay.clamp(max=FAR)
    # The difference comes first, because a large decay has few digits after the point.
    difference = b[0] - a[0] - decay
    log = torch.maximum(a[0], b[0] - decay) + F.softplus(-difference.abs())
    return log, a[1] + (b[1] - a[1]) * difference.sigmoid()
