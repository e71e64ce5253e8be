"""Layers on channels-last maps (B, H, W, C): plain torch modules."""

from .block import Block, scale, unpack
from .bridge import HiddenStateBridge
from .channel_mix import ChannelMix
from .conv import Conv2d, DepthwiseConv2d, add_conv
from .drop_path import DropPath, drop_path_schedule
from .ffn import FFN
from .init import init_linear
from .join import join_gradients
from .mask import downsample_mask, mask_padding
from .norm import LayerNorm, with_kernel
from .patch_embed import ConvNormEmbed, ConvStem, PatchEmbed
from .qk_norm import QKNorm
from .rotary import rotary_frequencies
from .token_shift import QShift
from .watch import is_watched

__all__ = [
    'FFN',
    'Block',
    'ChannelMix',
    'Conv2d',
    'ConvNormEmbed',
    'ConvStem',
    'DepthwiseConv2d',
    'DropPath',
    'HiddenStateBridge',
    'LayerNorm',
    'PatchEmbed',
    'QKNorm',
    'QShift',
    'add_conv',
    'downsample_mask',
    'drop_path_schedule',
    'init_linear',
    'is_watched',
    'join_gradients',
    'mask_padding',
    'rotary_frequencies',
    'scale',
    'unpack',
    'with_kernel',
]
