"""Layers on channels-last maps (B, H, W, C): plain torch modules."""

from .block import Block
from .conv import Conv2d, DepthwiseConv2d
from .drop_path import DropPath, drop_path_schedule
from .ffn import FFN
from .hsb import HSB
from .init import init_linear
from .mask import masked, strided
from .norm import Norm, identity
from .patch_embed import ConvNormEmbed, ConvStem, PatchEmbed
from .rotary import rotary_frequencies

__all__ = [
    'FFN',
    'HSB',
    'Block',
    'Conv2d',
    'ConvNormEmbed',
    'ConvStem',
    'DepthwiseConv2d',
    'DropPath',
    'Norm',
    'PatchEmbed',
    'drop_path_schedule',
    'identity',
    'init_linear',
    'masked',
    'rotary_frequencies',
    'strided',
]
