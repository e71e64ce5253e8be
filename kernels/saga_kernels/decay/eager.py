"""Decay linear attention as PyTorch runs it: on a CPU, and in exports.

Tokens stand in scan order and are cut into chunks. Tokens of one chunk meet in a (CHUNK x CHUNK)
product; those of other chunks have left a state (D x (D + 1): S and, beside it, z) that decays from
chunk to chunk, one state forward and one backward.

States are carried over two levels, so that no Python loop depends on N: GROUP chunks meet in one
triangular decay matrix, and groups in another. That is O(N) except for the last matrix, which has
(N / 512)^2 entries per head: 0.64 million for 409,600 tokens. Every exponent is a distance times
log_decay, and no distance is negative, so that nothing overflows.

Sums do not grow with the image, so that an exported graph may run in float16 throughout: weights
are divided by about their sum, and in exports features by their largest one. Both cancel, except in
eps, which is divided likewise.

There is one chunk and one group more than needed, since torch.export fixes an axis of length one
for good.

Legend: B batch, N tokens, H heads, D head dim, C chunks, L = CHUNK.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import ceil_div
from ..feature_maps import FeatureMap, phi, with_lean_gradient
from ..means import positive_or_one
from ..precision import compute_dtype, outside_autocast
from ..tracing import is_tracing_or_exporting

# Tokens per chunk, and chunks per group.
CHUNK = 64
GROUP = 8


@outside_autocast
def attend(
    packed: Tensor,
    log_decay: Tensor,
    size: tuple[int, int],
    feature_map: str,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    """`reference.attend` in O(N) time and memory."""
    height, width = size
    phi = with_lean_gradient(feature_map)
    # A Python integer in a trace too, where shapes are tensors.
    heads = len(log_decay.unbind())
    if heads == 1:
        return _scan(packed, log_decay, phi, eps, mask)
    halves = [heads - heads // 2, heads // 2]
    rows, columns = packed.split(halves, 3)
    row_decay, column_decay = log_decay.split(halves)
    by_row = _scan(rows, row_decay, phi, eps, mask)
    by_column = _scan(
        _transpose(columns, height, width),
        column_decay,
        phi,
        eps,
        None if mask is None else _transpose(mask, height, width),
    )
    return torch.cat([by_row, _transpose(by_column, width, height)], 2)


def _transpose(x: Tensor, height: int, width: int) -> Tensor:
    """Row-major tokens (B, N, ...) of a map, column-major."""
    # Not by unflatten: the TorchScript exporter to ONNX would fix the shape.
    batch, tokens, *rest = x.shape
    return x.reshape(batch, height, width, *rest).transpose(1, 2).reshape(batch, tokens, *rest)


def _scan(
    packed: Tensor, log_decay: Tensor, feature_map: FeatureMap, eps: float, mask: Tensor | None
) -> Tensor:
    """Attention over tokens that stand in scan order: (B, N, 3, H, D) -> (B, N, H, D)."""
    batch, tokens, _, heads, dim = packed.shape
    chunks = ceil_div(tokens, CHUNK) + 1
    compute = compute_dtype(packed)
    # One unbind, so that the backward pass writes one packed gradient instead of adding up three.
    query, key, value = packed.unbind(2)
    masked = None
    if mask is not None:
        masked = ~mask[:, :, None, None]
        # Before the functions of them, so that what a masked token holds has no gradient either.
        key = key.masked_fill(masked, -torch.inf)
        query, value = (x.masked_fill(masked, 0) for x in (query, value))

    def chunked(x: Tensor) -> Tensor:
        # (B, N, H, D) -> (B, H, C, L, D), the last chunk filled up with zeros
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * CHUNK - tokens))
        return x.reshape(batch, chunks, CHUNK, heads, x.shape[-1]).permute(0, 3, 1, 2, 4)

    q, k = (phi(x.to(compute), feature_map) for x in (query, key))
    eps_here: float | Tensor = eps
    if is_tracing_or_exporting():
        key_scale = positive_or_one(k.amax((1, 3), keepdim=True))
        query_scale = positive_or_one(q.amax(3, keepdim=True))
        q, k = q / query_scale, k / key_scale
        eps_here = chunked(eps / key_scale / query_scale)
    q, k = chunked(q), chunked(k)
    # The numerator, and in one more channel the denominator.
    v = chunked(F.pad(value.to(compute), (0, 1), value=1.0))
    rate = log_decay.to(compute)
    step = rate * CHUNK
    here = torch.arange(CHUNK, device=packed.device)
    # (H, 1, 1, 1)
    share = _share(step, chunks)[:, None, None, None]

    # (H, 1, L, L)
    within = _decay(rate, (here[:, None] - here).abs()).unsqueeze(1) * (share / CHUNK)
    out = (q @ k.transpose(3, 4) * within) @ v
    # Distances to the ends of the chunk: tokens of earlier chunks arrive from before the first
    # token, and leave with the last one.
    to_last, to_first = _decay(rate, CHUNK - 1 - here), _decay(rate, here)
    for leave, arrive, forward in ((to_last, to_first, True), (to_first, to_last, False)):
        # (B, H, C, D, D + 1)
        states = (k * (leave / CHUNK)[:, None, :, None]).transpose(3, 4) @ v
        carried = _carry(states.flatten(3), step, share, forward).view(states.shape)
        out = out + (q * (arrive * rate.exp()[:, None])[:, None, :, None]) @ carried
    denominator = out[..., dim:] + eps_here * (share / CHUNK)
    if is_tracing_or_exporting():
        denominator = positive_or_one(denominator)
    out = out[..., :dim] / denominator
    out = out.permute(0, 2, 3, 1, 4).reshape(batch, chunks * CHUNK, heads, dim)
    out = out[:, :tokens].to(packed.dtype)
    return out if masked is None else out.masked_fill(masked, 0)


def _share(step: Tensor, count: int) -> Tensor:
    """About one over the sum of exp(step * c) for c = 0, ..., count - 1: (H,), without a gradient.

    The right order of magnitude is enough, since this cancels.
    """
    rate = -step.detach()
    return torch.maximum(rate / (1 + rate), torch.ones_like(rate) / count)


def _carry(states: Tensor, step: Tensor, share: Tensor, forward: bool) -> Tensor:
    """What has arrived at each state: y_c = share * sum over b < c of exp(step (c - 1 - b)) x_b.

    Args:
        states: x, (B, H, C, X).
        step: (H,), not positive.
        share: (H, 1, 1, 1).
        forward: Else from the other side, b > c.
    """
    batch, heads, count, width = states.shape
    groups = ceil_div(count, GROUP) + 1
    here = torch.arange(GROUP, device=states.device)
    to_last, to_first = _decay(step, GROUP - 1 - here), _decay(step, here)
    leave, arrive = (to_last, to_first) if forward else (to_first, to_last)
    x = F.pad(states, (0, 0, 0, groups * GROUP - count))
    x = x.reshape(batch, heads, groups, GROUP, width)
    # (B, H, groups, X)
    totals = ((leave / GROUP)[:, None, None] @ x).squeeze(3)
    carried = (_passed(step * GROUP, groups, forward) * (share * GROUP).squeeze(1)) @ totals
    y = (_passed(step, GROUP, forward)[:, None] * share) @ x
    y = y + arrive[:, None, :, None] * carried.unsqueeze(3)
    return y.reshape(batch, heads, groups * GROUP, width)[:, :, :count]


def _passed(step: Tensor, count: int, forward: bool) -> Tensor:
    """Weights (H, count, count) of earlier steps: exp(step (c - 1 - b)) where b < c, else 0."""
    here = torch.arange(count, device=step.device)
    # The absolute value keeps the entries that are left out finite, and with them their gradient.
    earlier = _decay(step, (here[:, None] - 1 - here).abs()).tril(-1)
    return earlier if forward else earlier.transpose(1, 2)


def _decay(step: Tensor, distance: Tensor) -> Tensor:
    """exp(step * distance), (H, *distance.shape)."""
    return (step.view(-1, *[1] * distance.ndim) * distance).exp()
