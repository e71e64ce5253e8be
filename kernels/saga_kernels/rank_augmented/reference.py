"""Rank-augmented linear attention in eager PyTorch: the specification, the CPU path, and what
exports see.

Legend: B batch, N tokens, H heads, D head dim.
"""

import torch
from torch import Tensor

from ..feature_maps import phi


def attend(
    qkv: Tensor, size: tuple[int, int], frequencies: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D) of an image of (height, width) = size tokens.

    Half precision is computed in fp32, under autocast too. Temporaries die as soon as possible.
    """
    device = qkv.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _attend(qkv, size, frequencies, eps, mask)
    return _attend(qkv, size, frequencies, eps, mask)


def _attend(
    qkv: Tensor, size: tuple[int, int], frequencies: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    # One unbind, so that the backward pass writes one packed gradient instead of adding up three.
    query, key, value = qkv.unbind(2)
    compute = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    # (B, 1, N, 1)
    hidden = None if mask is None else ~mask[:, None, :, None]

    def per_head(x: Tensor) -> Tensor:
        # (B, N, H, D) -> (B, H, N, D)
        x = x.transpose(1, 2)
        return x.contiguous() if hidden is None else x.masked_fill(hidden, 0)

    q = per_head(phi(query.to(compute), 'elu'))
    k = per_head(phi(key.to(compute), 'elu'))
    # (B, H, N, 1); the mean of the queries is (B, H, D, 1)
    weights = _softmax(k @ _mean(q, mask).mul(qkv.shape[-1] ** -0.5).unsqueeze(-1), hidden)
    k = k * weights
    # A masked query has phi(q) = 0, so its output is 0 / eps = 0.
    denominator = q @ k.sum(2).unsqueeze(-1) + eps
    cos, sin = _rotation(size, frequencies.to(compute))
    k = _rotate(k, cos, sin)
    # (B, H, D, D)
    state = k.transpose(2, 3) @ per_head(value.to(compute))
    del k
    out = _rotate(q, cos, sin) @ state / denominator
    return out.transpose(1, 2).to(qkv.dtype)


def _mean(q: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens: (B, H, N, D), zero where masked, -> (B, H, D)."""
    if mask is None:
        return q.mean(2)
    return q.sum(2) / mask.sum(1).clamp(min=1)[:, None, None]


def _softmax(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over tokens of (B, H, N, 1); finite where every token is masked."""
    if hidden is not None:
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
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
