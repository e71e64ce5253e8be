"""Attention over the tokens of a map (B, H, W, C): plain torch modules, one mechanism per file."""

from .decay import DecayLinearAttention
from .gated import GatedLinearAttention
from .rank_augmented import RankAugmentedAttention
from .softmax import SoftmaxAttention
from .wkv import WKVAttention

__all__ = [
    'DecayLinearAttention',
    'GatedLinearAttention',
    'RankAugmentedAttention',
    'SoftmaxAttention',
    'WKVAttention',
]
