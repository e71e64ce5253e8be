"""Chunks of tokens: temporaries that fit a CPU's cache, and hardly any memory beside the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .tracing import is_tracing_or_compiling

# Bytes of the largest temporary of a chunk: what a core finds in its cache.
BUDGET = 2**21


def chunk_length(x: Tensor, bytes_per_token: int) -> int | None:
    """Tokens per chunk of x (B, N, ...); None for all of them at once.

    Chunks pay on a CPU only, and only where autograd does not keep the temporaries anyway. A graph
    that is recorded for other sizes must not depend on them.

    Args:
        x: The input whose tokens are to be worked on.
        bytes_per_token: Size of the largest temporary for one token of all images.
    """
    if is_tracing_or_compiling() or torch.is_grad_enabled() or x.device.type != 'cpu':
        return None
    length = max(1, BUDGET // max(1, bytes_per_token))
    return length if length < x.shape[1] else None


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for a number of tokens or chunks that may be symbolic."""
    # Not -(-a // b): the TorchScript exporter to ONNX rounds a negative quotient towards zero.
    return (a + b - 1) // b


def split_mask(mask: Tensor | None, length: int, number: int) -> Sequence[Tensor | None]:
    """A token mask (B, N), or None, for each of a number of chunks."""
    return [None] * number if mask is None else mask.split(length, 1)
