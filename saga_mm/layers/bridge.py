"""Hidden State Bridge. Legend: B batch, H height, W width, C channels."""

import torch.nn.functional as F
from torch import Tensor, nn

from .conv import to_channels_first
from .init import init_linear
from .mask import mask_padding


class HiddenStateBridge(nn.Module):
    """Adds the hidden state of an earlier layer to the input of a later one, gated by that input.

    y = x + sigmoid(x) * Linear(Sampling(h)), where Sampling is the mean over the tokens of the
    image in each window of stride x stride tokens.

    Args:
        state_dim: Channels of the hidden state h.
        dim: Channels of x.
        stride: Tokens of h, along one side, per token of x.

    Source: the formula is that of arXiv 2601.11164 (SoLA-Vision), which names neither the
    activation nor the sampling. The sigmoid is the project's choice, because it keeps the gate
    bounded; so is the mean, because it has no parameters and keeps the scale of h.
    """

    def __init__(self, state_dim: int, dim: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.linear = init_linear(nn.Linear(state_dim, dim))

    def forward(self, x: Tensor, state: Tensor, mask: Tensor | None = None) -> Tensor:
        """The input of the later layer, (B, H, W, C).

        Args:
            x: The output of the layer before the later one, (B, H, W, C).
            state: h, (B, H', W', state_dim), where H = ceil(H' / stride) and W = ceil(W' / stride).
            mask: The mask of h, as in `mask_padding`, or None.
        """
        return x + x.sigmoid() * self.linear(window_means(state, mask, self.stride))

    def extra_repr(self) -> str:
        return f'stride={self.stride}'


def window_means(x: Tensor, mask: Tensor | None, stride: int) -> Tensor:
    """Mean over the tokens of the image in each window: (B, H, W, C) -> (B, ceil(H / stride),
    ceil(W / stride), C). A window without such a token gives zeros."""
    height, width = x.shape[1:3]
    inside = x.new_ones(1, height, width, 1) if mask is None else mask.to(x.dtype)
    sums, counts = (
        F.avg_pool2d(
            to_channels_first(F.pad(y, (0, 0, 0, -width % stride, 0, -height % stride))), stride
        ).permute(0, 2, 3, 1)
        for y in (mask_padding(x, mask), inside)
    )
    # A window with one token of the image has the mean 1 / stride**2.
    return sums / counts.clamp(min=1 / stride**2)
