"""The KV state of linear attention, gated and plain, in pieces.

Linear attention is a sum over tokens, the state, that every token then reads. The pieces let a
caller go through an image in chunks: `kv_state` of each, `sum_states` of all, `read_state` for each
chunk of queries. On the whole image at once they are the specification of the op.

Legend: B batch, N tokens, H heads, D head dim.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..defaults import EPS, FEATURE_MAP
from ..feature_maps import FeatureMap, phi
from ..precision import compute_dtype, outside_autocast


class KVState(NamedTuple):
    """State of some tokens, float32 or better.

    Attributes:
        sums: S, (B, H, D, D): rows belong to channels of keys, columns to channels of values.
        normalizer: z, (B, H, D).
    """

    sums: Tensor
    normalizer: Tensor


@outside_autocast
def kv_state(
    key: Tensor,
    value: Tensor,
    *gates: Tensor,
    feature_map: FeatureMap = FEATURE_MAP,
    mask: Tensor | None = None,
) -> KVState:
    r"""The state that some tokens add up to.

    .. math::
        S = \sum_i (\sigma(a_i) \odot \phi(k_i))^T (\sigma(b_i) \odot v_i), \quad
        z = \sum_i \sigma(a_i) \odot \phi(k_i)

    without the :math:`\sigma` where there are no gates.

    Args:
        key: k, (B, N, H, D), any float dtype; half precision is computed in float32.
        value: v, likewise.
        gates: None, or the two gate logits a (of the key) and b (of the value), likewise.
        feature_map: :math:`\phi`, `'elu'` for ELU(x) + 1 or `'relu'`; or a function of a tensor
            that is zero at minus infinity.
        mask: (B, N) bool. False tokens add nothing, whatever they hold.
    """
    k, v = weighted_key_value(key, value, *gates, feature_map=feature_map, mask=mask)
    batch, _, heads, _ = key.shape
    # (B * H, N, D): products of three axes are what torch multiplies without copies.
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    sums = k.transpose(1, 2) @ v
    return KVState(sums.unflatten(0, (batch, heads)), k.sum(1).unflatten(0, (batch, heads)))


def weighted_key_value(
    key: Tensor, value: Tensor, *gates: Tensor, feature_map: FeatureMap, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    r"""What each token adds: :math:`\sigma(a) \odot \phi(k)` and :math:`\sigma(b) \odot v`."""
    if len(gates) not in (0, 2):
        raise ValueError(f'gates must be none or two tensors, got {len(gates)}')
    compute = compute_dtype(key)
    if mask is not None:
        masked = ~mask[:, :, None, None]
        # Before the functions of them, so that what a masked token holds has no gradient either.
        key = key.masked_fill(masked, -torch.inf)
        value = value.masked_fill(masked, 0)
        gates = tuple(gate.masked_fill(masked, 0) for gate in gates)
    k, v = phi(key.to(compute), feature_map), value.to(compute)
    if gates:
        a, b = (logit.to(compute).sigmoid() for logit in gates)
        k, v = k * a, v * b
    return k, v


def sum_states(states: Iterable[KVState]) -> KVState:
    """The state of all tokens, from those of disjoint parts of them.

    Args:
        states: At least one, all of the same shape.
    """
    return functools.reduce(
        lambda a, b: KVState(a.sums + b.sums, a.normalizer + b.normalizer), states
    )


@outside_autocast
def read_state(
    query: Tensor,
    state: KVState,
    feature_map: FeatureMap = FEATURE_MAP,
    eps: float = EPS,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Output of some tokens: :math:`o_i = \phi(q_i) S / (\phi(q_i) \cdot z + \epsilon)`.

    Args:
        query: q, (B, N, H, D), any float dtype; half precision is computed in float32.
        state: Of all tokens of the image.
        feature_map: The one that the state was made with.
        eps: :math:`\epsilon`, added to the denominator.
        mask: (B, N) bool. The output of False tokens is zero, whatever they hold.

    Returns:
        (B, N, H, D) in the dtype of the query.
    """
    batch, _, heads, _ = query.shape
    masked = None if mask is None else ~mask[:, :, None, None]
    if masked is not None:
        query = query.masked_fill(masked, 0)
    sums, normalizer = (x.flatten(0, 1) for x in state)
    # (B * H, N, D)
    q = phi(query.to(sums.dtype), feature_map).transpose(1, 2).flatten(0, 1)
    # eps keeps its place in the denominator, (B * H, N, 1), small beside a token tensor.
    out = q @ sums / (q @ normalizer.unsqueeze(-1) + eps)
    out = out.unflatten(0, (batch, heads)).transpose(1, 2).to(query.dtype)
    return out if masked is None else out.masked_fill(masked, 0)
