"""The first half of a block in plain PyTorch: the specification, for CPUs and exports too."""

import torch.nn.functional as F
from torch import Tensor

from ..depthwise.reference import convolve
from ..feature_maps import FeatureMap
from ..gated.eager import attend


def attention(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    in_proj: tuple[Tensor, Tensor],
    proj: tuple[Tensor, Tensor],
    heads: int,
    lepe: tuple[Tensor, Tensor] | None,
    output_gate: tuple[Tensor, Tensor] | None,
    gamma: Tensor | None,
    mask: Tensor | None,
    feature_map: FeatureMap,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """`gated_attention` in plain PyTorch."""
    channels = x.shape[-1]
    h = F.layer_norm(x, norm[0].shape, *norm, norm_eps)
    projected = F.linear(h, *in_proj)
    packed = projected.flatten(1, 2).unflatten(-1, (-1, heads, channels // heads))
    tokens = None if mask is None else mask.flatten(1)
    y = attend(packed, feature_map, eps, tokens).reshape(x.shape)
    if lepe is not None:
        y = convolve(projected[..., 2 * channels : 3 * channels], *lepe, y, mask)
    if output_gate is not None:
        y = y * F.linear(h, *output_gate)
    y = F.linear(y, *proj)
    return x + (y if gamma is None else y * gamma)
