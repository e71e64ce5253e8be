"""Angles of the rotary position encoding of RAVLT, arXiv 2411.07635.

`saga_kernels.apply_rotary_2d` rotates tokens by these angles.
"""

import torch
from torch import Tensor


def rotary_frequencies(dim: int, device: torch.device | str | None = None) -> Tensor:
    """Angles (D / 4,), float32, in radians per row or column, from 1 down to 1 / 10000."""
    return 1 / 10000 ** torch.linspace(0, 1, dim // 4, dtype=torch.float32, device=device)
