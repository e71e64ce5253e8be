"""Decay linear attention: the specification, in plain PyTorch, with all weights (N, N)."""

import torch
from torch import Tensor

from ..feature_maps import FeatureMap, phi
from ..precision import compute_dtype, outside_autocast


@outside_autocast
def attend(
    qkv: Tensor,
    log_decay: Tensor,
    size: tuple[int, int],
    feature_map: FeatureMap,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D) of a (height, width) map: the formula of
    `decay_linear_attention`.

    Half precision is computed in fp32, under autocast too. Memory and time are O(N^2).
    """
    compute = compute_dtype(qkv)
    query, key, value = qkv.unbind(2)
    masked = None
    if mask is not None:
        masked = ~mask[:, :, None, None]
        # Before the functions of them, so that what a masked token holds has no gradient either.
        key = key.masked_fill(masked, -torch.inf)
        query, value = (x.masked_fill(masked, 0) for x in (query, value))
    # (B, H, N, D)
    q, k = (phi(x.to(compute), feature_map).transpose(1, 2) for x in (query, key))
    v = value.to(compute).transpose(1, 2)

    # (H, N, N)
    position = scan_positions(size, qkv.shape[3], qkv.device)
    distance = (position[:, :, None] - position[:, None, :]).abs()
    decay = (log_decay.to(compute)[:, None, None] * distance).exp()
    # (B, H, N, N)
    weights = q @ k.transpose(2, 3) * decay
    out = weights @ v / (weights.sum(3, keepdim=True) + eps)
    out = out.transpose(1, 2).to(qkv.dtype)
    return out if masked is None else out.masked_fill(masked, 0)


def scan_positions(size: tuple[int, int], heads: int, device: torch.device) -> Tensor:
    """Place of every token, row by row, in the scan of every head: (H, N)."""
    height, width = size
    by_row = torch.arange(height * width, device=device)
    by_column = by_row.view(width, height).t().flatten()
    return torch.stack([by_row if 2 * head < heads else by_column for head in range(heads)])
