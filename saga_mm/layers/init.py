"""Weight initialisation shared by the layers."""

from torch import nn


def init_linear(layer: nn.Linear) -> nn.Linear:
    """Set truncated normal weights (std 0.02) and a zero bias, and return the layer."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
