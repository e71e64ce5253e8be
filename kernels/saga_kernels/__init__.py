"""Linear attention for images in PyTorch.

One eager reference and one fused implementation per op.
"""

from .decay.api import decay_linear_attention
from .gated.api import gated_linear_attention, linear_attention
from .rank_augmented.api import rank_augmented_linear_attention

__all__ = [
    'decay_linear_attention',
    'gated_linear_attention',
    'linear_attention',
    'rank_augmented_linear_attention',
]
