"""How far a module sees: its effective receptive field, arXiv 1701.04128.

Legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gradient_mass(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What each place of maps (B, H, W, C) means to the centre token of a module's output.

    The mass of a place is the absolute value of its gradient, summed over channels; the gradient is
    that of a random projection of the centre token's channels.

    Args:
        module: Makes (B, H_out, W_out, C_out). Its centre token is (H_out // 2, W_out // 2).
        x: Input.

    Returns:
        (H, W), of sum 1: the mean over the batch of maps of sum 1.
    """
    x = x.detach().requires_grad_()
    out = module(x)
    centre = out[:, out.shape[1] // 2, out.shape[2] // 2]
    (gradient,) = torch.autograd.grad(centre, x, torch.randn_like(centre))
    # (B, H, W)
    mass = gradient.abs().sum(-1)
    return (mass / mass.sum((1, 2), keepdim=True)).mean(0)


def radius(mass: Tensor, share: float, centre: tuple[int, int] | None = None) -> float:
    """Distance within which at least `share` of the mass of a map (H, W) lies.

    Args:
        mass: Not negative.
        share: In (0, 1].
        centre: Row and column. Defaults to (H // 2, W // 2).
    """
    height, width = mass.shape
    row, column = centre or (height // 2, width // 2)
    rows = torch.arange(height, device=mass.device) - row
    columns = torch.arange(width, device=mass.device) - column
    distances = torch.hypot(rows[:, None].double(), columns.double()).flatten()
    # places at one distance are in or out together
    rings, ring = distances.unique(return_inverse=True)
    held = torch.zeros_like(rings).index_add_(0, ring, mass.flatten().double()).cumsum(0)
    index = torch.searchsorted(held, share * held[-1] * (1 - 1e-9))
    return rings[index].item()
