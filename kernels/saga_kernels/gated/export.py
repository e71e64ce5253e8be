"""Gated and plain linear attention for exported graphs, which may run in float16 throughout.

Legend: B batch, N tokens, H heads, D head dim, C chunks of L tokens.
"""

from torch import Tensor

from ..feature_maps import FeatureMap, phi
from ..means import LENGTH, mean_of_chunks, positive_or_one, split_up, tokens_of_groups
from ..precision import compute_dtype, outside_autocast
from .state import weighted_key_value


@outside_autocast
def attend(packed: Tensor, feature_map: FeatureMap, eps: float, mask: Tensor | None) -> Tensor:
    """`reference.attend` in numbers that do not grow with the image.

    Features are divided by their largest one, of all keys of a head and of each query, and sums are
    means: S and z then have the scale of v and of one. All of this cancels, but for eps, which is
    divided likewise.
    """
    query, *others = packed.unbind(2)
    # (B, H, N, D)
    k, v = weighted_key_value(*others, feature_map=feature_map, mask=mask)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    key_scale = positive_or_one(k.amax((2, 3), keepdim=True))
    # (B, H, C, L, D)
    k, v = (split_up(x, 2, LENGTH) for x in (k / key_scale, v))
    # (B, H, C, D, D)
    sums = (k / LENGTH).transpose(3, 4) @ v
    tokens = tokens_of_groups(sums)
    # (B, H, D, D) and (B, H, D, 1)
    sums, normalizer = mean_of_chunks(sums), mean_of_chunks(k.mean(3)).unsqueeze(3)

    masked = None if mask is None else ~mask[:, :, None, None]
    if masked is not None:
        query = query.masked_fill(masked, 0)
    q = phi(query.to(compute_dtype(query)), feature_map).transpose(1, 2)
    query_scale = positive_or_one(q.amax(3, keepdim=True))
    q = q / query_scale
    eps_here = eps / key_scale / query_scale / tokens
    out = q @ sums / positive_or_one(q @ normalizer + eps_here)
    out = out.transpose(1, 2).to(packed.dtype)
    return out if masked is None else out.masked_fill(masked, 0)
