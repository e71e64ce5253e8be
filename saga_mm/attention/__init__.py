"""Attention over the tokens of a map (B, H, W, C): plain torch modules, one mechanism per file."""

from .gated import GatedLinearAttention

__all__ = ['GatedLinearAttention']
