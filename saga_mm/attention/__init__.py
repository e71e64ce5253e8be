"""Attention over the tokens of a map (B, H, W, C): plain torch modules, one mechanism per file."""

from .base import PackedAttention
from .decay import DecayLinearAttention
from .gated import GatedLinearAttention
from .mechanisms import LINEAR, register_attention
from .rank_augmented import RankAugmentedAttention
from .softmax import SoftmaxAttention
from .wkv import WKVAttention

__all__ = [
    'LINEAR',
    'DecayLinearAttention',
    'GatedLinearAttention',
    'PackedAttention',
    'RankAugmentedAttention',
    'SoftmaxAttention',
    'WKVAttention',
    'register_attention',
]
