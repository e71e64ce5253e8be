"""Feed-forward network of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

from .init import init_linear


class FFN(nn.Module):
    """Two linear layers with a GELU between them, on the last axis.

    Args:
        dim: Channels of input and output.
        hidden_dim: Channels in between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = init_linear(nn.Linear(dim, hidden_dim))
        self.fc2 = init_linear(nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))
