"""Feed-forward network of Vision-RWKV. Legend: B batch, H height, W width, C channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from .init import init_linear
from .token_shift import QShift


class ChannelMix(nn.Module):
    """A feed-forward network with squared ReLU and an output gate: (B, H, W, C) -> the same shape.

    V(relu(K(x))^2) * sigmoid(R(x)), with linear layers K, V and R without biases.

    Args:
        dim: C.
        hidden_dim: Channels between K and V.
        token_shift: Read the mixtures of `QShift` in place of x.

    Source: arXiv 2403.02308 (Vision-RWKV).
    """

    def __init__(self, dim: int, hidden_dim: int, *, token_shift: bool = False) -> None:
        super().__init__()
        self.shift = QShift(dim, 2) if token_shift else None
        self.key = init_linear(nn.Linear(dim, hidden_dim, bias=False))
        self.value = init_linear(nn.Linear(hidden_dim, dim, bias=False))
        self.receptance = init_linear(nn.Linear(dim, dim, bias=False))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        k, r = (x, x) if self.shift is None else self.shift(x, mask)
        return self.value(F.relu(self.key(k)).square()) * self.receptance(r).sigmoid()
