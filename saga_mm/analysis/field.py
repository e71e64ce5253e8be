"""Measures how far a module sees: its effective receptive field, arXiv 1701.04128.

Legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.pyramid import PyramidBackbone

# Shares of the mass for which radii are reported.
SHARES = (0.5, 0.9)


def gradient_mass(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How much each position of maps (B, H, W, C) affects the centre token of a module's output.

    The mass of a position is the absolute value of its gradient, summed over channels. The gradient
    is that of a random projection of the channels of the centre token.

    Args:
        module: Returns (B, H_out, W_out, C_out). The centre token is (H_out // 2, W_out // 2).
        x: The maps.

    Returns:
        (H, W), with sum 1: the mean over the batch of maps with sum 1.
    """
    x = x.detach().requires_grad_()
    out = module(x)
    centre = out[:, out.shape[1] // 2, out.shape[2] // 2]
    (gradient,) = torch.autograd.grad(centre, x, torch.randn_like(centre))
    # (B, H, W)
    mass = gradient.abs().sum(-1)
    return (mass / mass.sum((1, 2), keepdim=True)).mean(0)


def radius(mass: Tensor, share: float, centre: Sequence[int] | None = None) -> float:
    """The distance from the centre within which at least `share` of the mass of a map (H, W) lies.

    Args:
        mass: Values that are not negative.
        share: A number in (0, 1].
        centre: Row and column. Defaults to (H // 2, W // 2).
    """
    height, width = mass.shape
    row, column = centre or (height // 2, width // 2)
    rows = torch.arange(height, device=mass.device) - row
    columns = torch.arange(width, device=mass.device) - column
    distances = torch.hypot(rows[:, None].double(), columns.double()).flatten()
    # positions at the same distance count together
    rings, ring = distances.unique(return_inverse=True)
    held = torch.zeros_like(rings).index_add_(0, ring, mass.flatten().double()).cumsum(0)
    index = torch.searchsorted(held, share * held[-1] * (1 - 1e-9))
    return rings[index].item()


def radii(mass: Tensor, centre: Sequence[int] | None = None) -> list[float]:
    """The radius for each of `SHARES`."""
    return [radius(mass, share, centre) for share in SHARES]


def stage_fields(backbone: PyramidBackbone, images: Sequence[Tensor]) -> dict[str, dict]:
    """How much each pixel affects the centre token of each output map of a backbone.

    Args:
        backbone: In eval mode. The map of its first stage has stride 4; each further stage doubles
            the stride.
        images: (B, 3, H, W) each, all of one size.

    Returns:
        By stage, from '0', the `radii` in pixels, and the `mass` of each patch of 4 x 4 pixels,
        (ceil(H / 4), ceil(W / 4)).
    """
    found = {}
    for number, stage in enumerate(backbone.out_indices):

        def output(x: Tensor, number: int = number) -> Tensor:
            return backbone(x.permute(0, 3, 1, 2))[number].permute(0, 2, 3, 1)

        masses = [gradient_mass(output, image.permute(0, 2, 3, 1)) for image in images]
        mass = torch.stack(masses).mean(0).cpu()
        stride = 4 * 2**stage
        # the pixel at the centre of the convolutions that make the centre token
        centre = [-(-length // stride) // 2 * stride for length in mass.shape]
        # as the mass of single pixels is mostly noise
        patches = F.avg_pool2d(mass[None], 4, ceil_mode=True, divisor_override=1)[0]
        found[str(stage)] = dict(radii=radii(mass, centre), mass=patches)
    return found


def stack_radii(layers: Iterable[nn.Module], x: Tensor) -> list[list[float]]:
    """The radii, in tokens, of stacks of layers on maps (B, H, W, C): of the first one, the first
    two, and so on."""
    stack = nn.Sequential()
    found = []
    for layer in layers:
        stack.append(layer.to(x.device))
        found.append(radii(gradient_mass(stack, x)))
    return found
