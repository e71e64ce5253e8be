"""Rank-augmented linear attention: the specification, in plain PyTorch."""

import torch
from torch import Tensor

from ..feature_maps import FeatureMap, phi
from ..precision import compute_dtype, outside_autocast
from ..rotary import rotate_pairs, rotation_table


@outside_autocast
def attend(
    qkv: Tensor,
    size: tuple[int, int],
    frequencies: Tensor,
    eps: float,
    mask: Tensor | None,
    feature_map: FeatureMap = 'elu',
) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D) of an image of (height, width) = size tokens:
    the formula of `rank_augmented_linear_attention`.

    Half precision is computed in fp32, under autocast too.
    """
    compute = compute_dtype(qkv)
    # One unbind, so that the backward pass writes one packed gradient instead of adding up three.
    query, key, value = qkv.unbind(2)
    count: int | Tensor = qkv.shape[1]
    masked = None
    if mask is not None:
        masked = ~mask[:, :, None, None]
        # Before the functions of them, so that what a masked token holds has no gradient either.
        # Features are zero at minus infinity: masked tokens add nothing to means and sums.
        query, key = (x.masked_fill(masked, -torch.inf) for x in (query, key))
        value = value.masked_fill(masked, 0)
        count = mask.sum(1).clamp(min=1)[:, None, None, None]

    # (B, H, N, D)
    q, k = (phi(x.to(compute), feature_map).transpose(1, 2).contiguous() for x in (query, key))
    v = value.to(compute).transpose(1, 2).contiguous()
    mean = q.sum(2, keepdim=True) / count
    # (B, H, N, 1)
    logits = k @ (mean * qkv.shape[-1] ** -0.5).transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :, None], torch.finfo(compute).min)
    k_weighted = k * logits.softmax(2)

    cos, sin = rotation_table(size, frequencies.to(compute))
    sums = rotate_pairs(k_weighted, cos, sin).transpose(2, 3) @ v
    normalizer = k_weighted.sum(2).unsqueeze(-1)
    out = rotate_pairs(q, cos, sin) @ sums / (q @ normalizer + eps)
    out = out.transpose(1, 2).to(qkv.dtype)
    return out if masked is None else out.masked_fill(masked, 0)
