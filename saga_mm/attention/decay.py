"""Linear attention with distance decay as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels import decay_linear_attention
from saga_kernels.validation import check_feature_map, check_impl

from .base import PackedAttention


class DecayLinearAttention(PackedAttention):
    """Multi-head linear attention that weighs tokens by their distance in a scan, plus LePE.

    `saga_kernels.decay_linear_attention` mixes the tokens in O(N): the first half of the heads
    scans the map row by row, the other half column by column. Each head learns its decay, which
    stays in (0, 1): it is the sigmoid of `decay_logit`.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Heads.
        decay_lengths: Shortest and longest distance, in tokens, after which a weight has fallen to
            1 / e, at the start. The heads of each scan spread over this range in equal ratios.
        feature_map: `'elu'` for ELU(x) + 1, or `'relu'`.
        lepe_kernel_size: Kernel of the depthwise convolution, odd; 0 for none.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`.

    Source: after the linear attention with exponential distance decay that arXiv 2601.11164 is
    about. The scans, the parametrisation and its start are the project's choices.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay_lengths: tuple[float, float] = (4.0, 64.0),
        feature_map: str = 'elu',
        lepe_kernel_size: int = 3,
        impl: str = 'auto',
    ) -> None:
        super().__init__(dim, num_heads, parts=3, lepe_kernel_size=lepe_kernel_size)
        check_feature_map(feature_map)
        check_impl(impl)
        shortest, longest = decay_lengths
        if not 0 < shortest <= longest:
            raise ValueError(f'decay_lengths must be positive and in order, got {decay_lengths}')
        self.feature_map = feature_map
        self.impl = impl
        rows = num_heads - num_heads // 2
        lengths = [*spread(shortest, longest, rows), *spread(shortest, longest, num_heads - rows)]
        # sigmoid(decay_logit) = exp(-1 / length)
        self.decay_logit = nn.Parameter(-torch.expm1(1 / torch.tensor(lengths)).log())

    def attend(self, packed: Tensor, size: tuple[int, int]) -> Tensor:
        log_decay = F.logsigmoid(self.decay_logit)
        return decay_linear_attention(
            packed, log_decay, size, feature_map=self.feature_map, impl=self.impl
        )


def spread(low: float, high: float, number: int) -> list[float]:
    """So many values between two others, in equal ratios: one is the geometric mean."""
    return [low * (high / low) ** ((i + 0.5) / number) for i in range(number)]
