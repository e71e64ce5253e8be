"""Weight initialisation shared by the layers."""

import math

from torch import nn


def init_linear(layer: nn.Linear) -> nn.Linear:
    """Set truncated normal weights (std 0.02) and a zero bias, and return the layer."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def init_linear_layers(module: nn.Module, std: float | str) -> None:
    """Draw the weights of all linear layers in a module anew; biases stay as they are.

    Args:
        module: The module.
        std: The standard deviation, or 'fan_in' for 1 / sqrt(inputs of the layer), which keeps the
            size of a normalised input at every width.

    Raises:
        ValueError: `std` is neither.
    """
    if std != 'fan_in' and (isinstance(std, str) or not 0 < std < math.inf):
        raise ValueError(f"std must be a positive number or 'fan_in', got {std!r}")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            own = layer.in_features**-0.5 if isinstance(std, str) else std
            nn.init.trunc_normal_(layer.weight, std=own, a=-2 * own, b=2 * own)
