"""Bidirectional WKV: the specification, in plain PyTorch, with all weights (B, C, N, N)."""

import torch
from torch import Tensor

from ..precision import compute_dtype, outside_autocast


@outside_autocast
def attend(k: Tensor, v: Tensor, w: Tensor, u: Tensor, mask: Tensor | None) -> Tensor:
    """The formula of `bidirectional_wkv`, with its decay and bonus per token of each image.

    Half precision is computed in fp32, under autocast too. Memory and time are O(N^2).

    Args:
        k, v: (B, N, C).
        w, u: (B, C) or (1, C).
        mask: (B, N) bool, or None.
    """
    compute = compute_dtype(k)
    live = k.new_ones(k.shape[:2], dtype=torch.bool) if mask is None else mask
    key, value = k.to(compute), v.to(compute)
    key = key.masked_fill(~live[:, :, None], -torch.inf)
    value = value.masked_fill(~live[:, :, None], 0)
    # (B, 1, N, N): masked tokens do not count as distance.
    place = live.cumsum(1)
    distance = (place[:, None, :, None] - place[:, None, None, :]).abs()
    itself = torch.eye(k.shape[1], dtype=torch.bool, device=k.device)
    decay, bonus = (x.to(compute)[:, :, None, None] for x in (w, u))
    exponent = torch.where(itself, bonus, -(distance - 1) * decay) + key.mT[:, :, None]
    # A row without a live token would be NaN, and so would its gradient.
    exponent = exponent.masked_fill(~live[:, None, :, None], 0)
    # (B, C, N, N) @ (B, C, N, 1)
    out = (exponent.softmax(3) @ value.mT.unsqueeze(3)).squeeze(3).mT
    return out.to(v.dtype).masked_fill(~live[:, :, None], 0)
