"""Gated and plain linear attention as PyTorch runs it: on a CPU, and in exports."""

from torch import Tensor

from ..chunks import chunk_length, split_mask
from ..feature_maps import FeatureMap, with_lean_gradient
from ..tracing import is_tracing_or_exporting
from . import export, reference
from .state import kv_state, read_state, sum_states


def attend(packed: Tensor, feature_map: FeatureMap, eps: float, mask: Tensor | None) -> Tensor:
    """`reference.attend`, in chunks of tokens where these pay: there is then no temporary of the
    size of the input."""
    if is_tracing_or_exporting():
        return export.attend(packed, feature_map, eps, mask)
    batch, tokens, _, heads, dim = packed.shape
    phi = with_lean_gradient(feature_map)
    length = chunk_length(packed, batch * heads * dim * max(packed.itemsize, 4))
    if length is None:
        return reference.attend(packed, phi, eps, mask)
    chunks = [chunk.unbind(2) for chunk in packed.split(length, 1)]
    masks = split_mask(mask, length, len(chunks))
    state = sum_states(
        kv_state(key, value, *gates, feature_map=phi, mask=mask)
        for (_, key, value, *gates), mask in zip(chunks, masks, strict=True)
    )
    out = packed.new_empty((batch, tokens, heads, dim))
    places = out.split(length, 1)
    for place, (query, *_), mask in zip(places, chunks, masks, strict=True):
        place.copy_(read_state(query, state, phi, eps, mask))
    return out
