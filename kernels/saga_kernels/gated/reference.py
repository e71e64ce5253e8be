"""Gated and plain linear attention: the specification, in plain PyTorch."""

from torch import Tensor

from ..feature_maps import FeatureMap
from .state import kv_state, read_state


def attend(packed: Tensor, feature_map: FeatureMap, eps: float, mask: Tensor | None) -> Tensor:
    """Attention over packed q, k, v (B, N, 3, H, D), or q, k, v and the gate logits a, b
    (B, N, 5, H, D): the formulas of `gated_linear_attention` and `linear_attention`.

    Half precision is computed in fp32, under autocast too.
    """
    # One unbind, so that the backward pass writes one packed gradient instead of adding up five.
    query, key, value, *gates = packed.unbind(2)
    state = kv_state(key, value, *gates, feature_map=feature_map, mask=mask)
    return read_state(query, state, feature_map, eps, mask)
