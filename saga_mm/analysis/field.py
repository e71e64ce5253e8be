"""Measures how far a module sees: its effective receptive field, arXiv 1701.04128.

Legend: B batch, H height, W width, C channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import DecayLinearAttention, WKVAttention
from ..backbones.pyramid import PyramidBackbone
from .mixing import attention_layers, label, record_inputs

# Shares of the mass for which radii are reported.
SHARES = (0.5, 0.9)
# Quantiles over channels or heads for which decay lengths are reported.
QUANTILES = (0.0, 0.5, 1.0)


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


def law_radii(length: float, depth: int) -> list[float]:
    """The radii of a stack of WKV layers by the law that reach grows with the square root of depth.

    By the central limit theorem, the distance along the scan that a stack bridges is close to a
    normal distribution whose variance is the sum of those of its layers. The weight of a layer is 1
    for the token itself and e^(-(distance - 1) / length) for others: a variance of about
    2 * length^2, as in the paper, if the length is many tokens.

    Args:
        length: In tokens.
        depth: Number of layers.

    Source: the analysis in arXiv 2601.11164 (SoLA-Vision), for the weights of arXiv 2403.02308.
    """
    q = math.exp(-1 / length)
    # sums over both sides of distance^2 times weight, and of the weights
    variance = 2 * (1 + q) / (1 - q) ** 3 / (1 + 2 / (1 - q))
    deviation = math.sqrt(depth * variance)
    return [deviation * statistics.NormalDist().inv_cdf((1 + share) / 2) for share in SHARES]


def layer_decays(backbone: PyramidBackbone, image: Tensor) -> dict[str, dict]:
    """How far the layers whose weights decay with the distance reach, from their parameters.

    Args:
        backbone: In eval mode.
        image: (B, C, H, W), which tells the size of each map.

    Returns:
        By the `label` of a layer: `size`, the (H, W) of its map, and `lengths`, the `QUANTILES`,
        over channels or heads, of the distance along the scan at which a weight falls to 1 / e, in
        tokens. Empty if no layer has a decay.
    """
    layers, found = attention_layers(backbone), {}
    for name, x in record_inputs(backbone, image).items():
        lengths = decay_lengths(layers[name], tokens=x[0, ..., 0].numel())
        if lengths is not None:
            order = torch.tensor(QUANTILES, dtype=lengths.dtype, device=lengths.device)
            found[label(name)] = dict(
                size=list(x.shape[1:3]), lengths=lengths.quantile(order).tolist()
            )
    return found


def decay_lengths(layer: nn.Module, tokens: int) -> Tensor | None:
    """The distance at which a weight falls to 1 / e, in tokens, by channel or head, or None."""
    if isinstance(layer, WKVAttention):
        scale = tokens if layer.decay_per == 'image' else 1
        return scale * (-layer.log_decay.detach().double()).exp()
    if isinstance(layer, DecayLinearAttention):
        return -1 / F.logsigmoid(layer.decay_logit.detach().double())
    return None
