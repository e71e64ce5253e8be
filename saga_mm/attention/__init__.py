"""Attention over the tokens of a map (B, H, W, C): plain torch modules, one mechanism per file."""

from .gated import GatedLinearAttention
from .rank_augmented import RankAugmentedAttention

__all__ = ['GatedLinearAttention', 'RankAugmentedAttention']
