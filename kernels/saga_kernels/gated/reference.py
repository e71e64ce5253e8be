"""Gated linear attention in eager PyTorch: the specification, the CPU path, and what exports see.

Legend: B batch, N tokens, H heads, D head dim.
"""

import torch
from torch import Tensor

from ..feature_maps import phi


def attend(packed: Tensor, feature_map: str, eps: float, mask: Tensor | None) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D), or q, k, v, a, b (B, N, 5, H, D) with gate
    logits.

    Half precision is computed in fp32, under autocast too. Temporaries die as soon as possible:
    without grad at most three (B, N, H, D) tensors live at a time besides input and output.
    """
    device = packed.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return _attend(packed, feature_map, eps, mask)
    return _attend(packed, feature_map, eps, mask)


def _attend(packed: Tensor, feature_map: str, eps: float, mask: Tensor | None) -> Tensor:
    batch, tokens, _, heads, dim = packed.shape
    # One unbind, so that the backward pass writes one packed gradient instead of adding up five.
    query, key, value, *gates = packed.unbind(2)
    compute = torch.float64 if packed.dtype == torch.float64 else torch.float32
    hidden = None if mask is None else ~mask[:, :, None, None]

    def per_head(x: Tensor) -> Tensor:
        # (B, N, H, D) -> (B*H, N, D)
        if hidden is not None:
            x = x.masked_fill(hidden, 0)
        return x.transpose(1, 2).reshape(batch * heads, tokens, dim)

    def gated(x: Tensor, index: int) -> Tensor:
        return x * gates[index].to(compute).sigmoid() if gates else x

    k = per_head(gated(phi(key.to(compute), feature_map), 0))
    v = per_head(gated(value.to(compute), 1))
    # (B*H, D, D), (B*H, D, 1)
    state = k.transpose(1, 2) @ v
    normalizer = k.sum(1).unsqueeze(-1)
    del k, v
    # A masked query has phi(q) = 0, so its output is 0 / eps = 0.
    q = per_head(phi(query.to(compute), feature_map))
    # eps keeps its place in the denominator, (B*H, N, 1), small beside a token tensor.
    out = (q @ state) / (q @ normalizer + eps)
    return out.view(batch, heads, tokens, dim).transpose(1, 2).to(packed.dtype)
