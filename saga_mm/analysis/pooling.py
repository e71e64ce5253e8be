"""A neck with which backbones of every toolbox serve a classifier of MMPretrain."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..registry import MODELS


@MODELS.register_module()
class MeanOfLastMap(nn.Module):
    """The mean over all positions of the last map: (B, C, H, W) -> (B, C).

    MMPretrain's `GlobalAveragePooling` computes the same, but does not take the lists that
    backbones of MMDetection return.
    """

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        return (maps[-1].mean((2, 3)),)
