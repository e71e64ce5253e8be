"""Feature maps of the references."""

import torch.nn.functional as F
from torch import Tensor


def phi(x: Tensor, feature_map: str) -> Tensor:
    """Non-negative feature map: ELU(x) + 1 or ReLU(x)."""
    # exp(x) where x <= 0: ELU(x) + 1 = (exp(x) - 1) + 1 loses what is small.
    return F.relu(x) if feature_map == 'relu' else F.relu(x) + x.clamp(max=0).exp()
