"""Layers on channels-last maps (B, H, W, C): plain torch modules."""

from .block import Block, scale
from .conv import Conv2d, DepthwiseConv2d
from .drop_path import DropPath, drop_path_schedule
from .ffn import FFN
from .hsb import HSB
from .init import init_linear
from .join import join_gradients
from .mask import downsample_mask, mask_padding
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
    'PatchEmbed',
    'downsample_mask',
    'drop_path_schedule',
    'init_linear',
    'join_gradients',
    'mask_padding',
    'rotary_frequencies',
    'scale',
]
