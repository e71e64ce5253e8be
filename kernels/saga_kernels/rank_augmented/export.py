"""Rank-augmented linear attention for exported graphs, which may run in float16 throughout.

Legend: B batch, N tokens, H heads, D head dim, C chunks of L tokens, G groups of chunks.
"""

import torch
from torch import Tensor

from ..feature_maps import phi
from ..means import GROUP, LENGTH, mean_of_chunks, positive_or_one, split_up
from ..precision import compute_dtype, outside_autocast
from ..rotary import rotate_pairs, rotation_table

# Logit of what has no part in the softmax: its weight is zero, in float16 too.
NO_PART = -1e4


@outside_autocast
def attend(
    qkv: Tensor, size: tuple[int, int], frequencies: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    """`reference.attend` in numbers that do not grow with the image.

    S and z are averages. Before a query meets S, it is divided by the denominator, and S by z, as
    far as the rotation allows: it turns pairs of channels, and a pair needs one divisor. All of
    this cancels, but for eps, which is divided likewise.
    """
    compute = compute_dtype(qkv)
    query, key, value = qkv.unbind(2)
    masked = None
    if mask is not None:
        masked = ~mask[:, :, None, None]
        query, key = (x.masked_fill(masked, -torch.inf) for x in (query, key))
        value = value.masked_fill(masked, 0)
    # (B, H, N, D)
    q, k = (phi(x.to(compute), 'elu').transpose(1, 2) for x in (query, key))
    v = value.to(compute).transpose(1, 2)

    cos, sin = rotation_table(size, frequencies.to(compute))
    logits = _logits(q, k, mask)
    key_scale = positive_or_one(k.amax((2, 3), keepdim=True))
    k = k / key_scale
    state, normalizer = _averages(logits, k, rotate_pairs(k, cos, sin), v)

    # z over its largest element, and its sum over each pair of channels, (B, H, 1, D)
    scale = positive_or_one(normalizer.amax(3, keepdim=True))
    normalizer = normalizer / scale
    pairs = normalizer.unflatten(3, (-1, 2)).sum(4).repeat_interleave(2, 3)
    query_scale = positive_or_one(q.amax(3, keepdim=True))
    q = q / query_scale
    denominator = q @ normalizer.transpose(2, 3) + eps / key_scale / scale / query_scale
    weights = rotate_pairs(q * pairs / positive_or_one(denominator), cos, sin)
    out = weights @ (state / scale / positive_or_one(pairs).transpose(2, 3))
    out = out.transpose(1, 2).to(qkv.dtype)
    return out if masked is None else out.masked_fill(masked, 0)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Logits of the softmax over keys, (B, H, N), from features (B, H, N, D)."""
    # One for each token that takes part, (1 or B, 1, N, 1): the mean of chunks counts others too.
    part = q.new_ones(q.shape[2])[None, None, :, None]
    if mask is not None:
        part = mask[:, None, :, None].to(q.dtype)
    mean, share = (mean_of_chunks(split_up(x, 2, LENGTH).mean(3)) for x in (q, part))
    mean = mean / positive_or_one(share) * q.shape[-1] ** -0.5
    # Features are near one: without the sum of the mean query, which the softmax does not see,
    # logits are small, and exact in few bits.
    logits = ((k - 1) @ mean.unsqueeze(3)).squeeze(3)
    return logits if mask is None else logits.masked_fill(~mask[:, None], NO_PART)


def _averages(logits: Tensor, k: Tensor, turned_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """S (B, H, D, D) and z (B, H, 1, D), weighted by the softmax of logits (B, H, N).

    One softmax over each chunk, one over the chunks of each group, and one over the groups.
    """
    dim = k.shape[-1]
    # (B, H, C, L), and (B, H, C, L, D)
    weights, logits = _softmax(split_up(logits, 2, LENGTH, NO_PART))
    k, turned_k, v = (split_up(x, 2, LENGTH) for x in (k, turned_k, v))
    weights = weights.unsqueeze(4)
    state = (turned_k * weights).transpose(3, 4) @ v
    # (B, H, C, D * D + D)
    state = torch.cat([state.flatten(3), (k * weights).sum(3)], 3)
    # (B, H, G, chunks of a group), and with the states behind
    logits, state = split_up(logits, 2, GROUP, NO_PART), split_up(state, 2, GROUP)
    for _ in range(2):
        weights, logits = _softmax(logits)
        state = (weights.unsqueeze(-2) @ state).squeeze(-2)
    sums, normalizer = state.split((dim * dim, dim), 2)
    return sums.unflatten(2, (dim, dim)), normalizer.unsqueeze(2)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, and the logarithm of the sum of what it is a share of."""
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total, (top + total.log()).squeeze(-1)
