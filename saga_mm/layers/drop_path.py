"""Stochastic depth, arXiv 1603.09382."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, drop whole samples of a residual branch and scale the rest by 1 / (1 - rate).

    Args:
        rate: Probability of dropping a sample, in [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f'rate must be in [0, 1), got {rate}')
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3g}'


def drop_path_schedule(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates per stage and block: from 0 at the first block linearly to `rate` at the last."""
    if not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {rate}')
    last = max(sum(depths) - 1, 1)
    rates = (rate * i / last for i in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]
