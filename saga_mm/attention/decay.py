"""Linear attention with distance decay as a module.

Legend: B batch, H height, W width, N = H * W tokens, C channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saga_kernels import decay_linear_attention
from saga_kernels.dispatch import Impl
from saga_kernels.validation import check_feature_map, check_impl

from .base import PackedAttention


class DecayLinearAttention(PackedAttention):
    """Multi-head linear attention that weighs tokens by their distance in a scan, plus LePE.

    `saga_kernels.decay_linear_attention` mixes the tokens in O(N): the first half of the heads
    scans the map row by row, the other half column by column. Each head learns its decay, which
    stays in (0, 1): it is the sigmoid of `decay_logit`.

    Args:
        dim: C, a multiple of `num_heads`.
        num_heads: Number of heads.
        decay_lengths: Shortest and longest distance, in tokens, at which an initial weight is
            1 / e. The initial lengths of the heads of each scan divide this range in equal ratios.
        feature_map: `'elu'` for ELU(x) + 1, or `'relu'`.
        lepe_kernel_size: Kernel size of the depthwise convolution, odd; 0 for no convolution.
        impl: `'auto'`, `'reference'` or `'triton'`; see `saga_kernels.dispatch`.

    Source: based on the linear attention with exponential distance decay that arXiv 2601.11164
    discusses. The scans, the parametrisation and its initial values are the project's choices.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        decay_lengths: tuple[float, float] = (4.0, 64.0),
        feature_map: str = 'elu',
        lepe_kernel_size: int = 3,
        impl: Impl = 'auto',
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

    def attend(self, packed: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        log_decay = F.logsigmoid(self.decay_logit)
        op = partial(decay_linear_attention, feature_map=self.feature_map, impl=self.impl)
        if mask is None:
            return op(packed, log_decay, size)
        # Padding between the tokens of an image would count as distance. So each head gets the
        # tokens in the order of its scan, those of the image first, as a map of one row.
        rows, columns = scan_positions(mask.reshape(mask.shape[0], *size))
        heads = (self.num_heads - self.num_heads // 2, self.num_heads // 2)
        # (B, N, heads, 1)
        place = torch.cat([rows] * heads[0] + [columns] * heads[1], 2).unsqueeze(3)
        scan = torch.empty_like(packed).scatter(1, place.unsqueeze(2).expand_as(packed), packed)
        inside = torch.arange(mask.shape[1], device=mask.device) < mask.sum(1, keepdim=True)
        out = op(scan, log_decay, (1, mask.shape[1]), mask=inside)
        return out.gather(1, place.expand_as(out))


def scan_positions(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (B, N, 1) of the tokens of maps (B, H, W) in a scan by rows and in one by columns.

    Tokens inside the mask come first, then the others, so that each position is used once.
    """

    def by_row(mask: Tensor) -> Tensor:
        shape, mask = mask.shape, mask.flatten(1).long()
        inside = mask.cumsum(1)
        outside = (1 - mask).cumsum(1) + inside[:, -1:]
        return (torch.where(mask > 0, inside, outside) - 1).view(shape)

    rows, columns = by_row(mask), by_row(mask.transpose(1, 2)).transpose(1, 2)
    return rows.flatten(1).unsqueeze(2), columns.flatten(1).unsqueeze(2)


def spread(low: float, high: float, number: int) -> list[float]:
    """Values between `low` and `high` in equal ratios; a single one is the geometric mean."""
    return [low * (high / low) ** ((i + 0.5) / number) for i in range(number)]
