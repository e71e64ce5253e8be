"""Rank-augmented linear attention as PyTorch runs it: on a CPU, and in exports.

Legend: B batch, N tokens, H heads, D head dim.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..chunks import chunk_length, split_mask
from ..feature_maps import phi, with_lean_gradient
from ..precision import compute_dtype, outside_autocast
from ..rotary import rotate_pairs, rotation_table
from ..tracing import is_tracing_or_exporting
from . import export, reference


@outside_autocast
def attend(
    qkv: Tensor, size: tuple[int, int], frequencies: Tensor, eps: float, mask: Tensor | None
) -> Tensor:
    """`reference.attend`, in chunks of tokens where these pay: besides the table of the rotation,
    which images and heads share, there is then no temporary of the size of the input."""
    if is_tracing_or_exporting():
        return export.attend(qkv, size, frequencies, eps, mask)
    batch, _, _, heads, dim = qkv.shape
    length = chunk_length(qkv, batch * heads * dim * compute_dtype(qkv).itemsize)
    if length is None:
        feature_map = with_lean_gradient('elu')
        return reference.attend(qkv, size, frequencies, eps, mask, feature_map)
    return _attend_in_chunks(qkv, size, frequencies, eps, mask, length)


def _attend_in_chunks(
    qkv: Tensor,
    size: tuple[int, int],
    frequencies: Tensor,
    eps: float,
    mask: Tensor | None,
    length: int,
) -> Tensor:
    """Three passes over the tokens: for the mean query, for the state, and for the output.

    The softmax needs all logits at once, which are few: (B, H, N, 1).
    """
    compute = compute_dtype(qkv)
    query, key, value = (part.split(length, 1) for part in qkv.unbind(2))
    masks = split_mask(mask, length, len(query))
    tables = [table.split(length) for table in rotation_table(size, frequencies.to(compute))]

    def per_head(chunks: Sequence[Tensor], *, features: bool) -> Iterator[Tensor]:
        """(B, n, H, D) -> (B, H, n, D), zero where masked."""
        for x, visible in zip(chunks, masks, strict=True):
            x = x.to(compute)
            x = (phi(x, 'elu') if features else x).transpose(1, 2)
            if visible is not None:
                x = x.masked_fill(~visible[:, None, :, None], 0)
            yield x.contiguous()

    count = qkv.shape[1] if mask is None else mask.sum(1).clamp(min=1)[:, None, None, None]
    mean = sum(q.sum(2, keepdim=True) for q in per_head(query, features=True)) / count
    mean = (mean * qkv.shape[-1] ** -0.5).transpose(2, 3)
    logits = torch.cat([k @ mean for k in per_head(key, features=True)], 2)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, :, None], torch.finfo(compute).min)

    sums = normalizer = torch.zeros((), dtype=compute)
    weights = logits.softmax(2).split(length, 2)
    keys, values = per_head(key, features=True), per_head(value, features=False)
    for k, v, weight, cos, sin in zip(keys, values, weights, *tables, strict=True):
        k = k * weight
        sums = sums + rotate_pairs(k, cos, sin).transpose(2, 3) @ v
        normalizer = normalizer + k.sum(2).unsqueeze(-1)

    out = qkv.new_empty(qkv[:, :, 0].shape)
    queries = per_head(query, features=True)
    for place, q, cos, sin in zip(out.split(length, 1), queries, *tables, strict=True):
        # A masked query has phi(q) = 0, so its output is 0 / eps = 0.
        chunk = rotate_pairs(q, cos, sin) @ sums / (q @ normalizer + eps)
        place.copy_(chunk.transpose(1, 2))
    return out
