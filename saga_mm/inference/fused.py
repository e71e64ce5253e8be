"""Runs the halves of plain blocks as fused kernels, for inference on a GPU.

Attention computes several maps of its input, and the FFN maps that have several times as many
channels. The kernels keep them on the chip, as chunks of rows keep them in the cache of a CPU.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from saga_kernels import ffn, gated_attention
from saga_kernels.dispatch import resolve_impl
from saga_kernels.ffn.api import why_not_kernel as why_not_ffn
from saga_kernels.gated_attention.api import why_not_kernel as why_not_attention
from saga_kernels.tracing import is_tracing_or_exporting

from ..attention import GatedLinearAttention
from ..layers import FFN, Block, LayerNorm, is_watched


def can_fuse(block: Block, x: Tensor) -> bool:
    """Whether a half of a plain block can run as fused kernels, and no caller can tell.

    Compiled code takes the kernels as well. Exported code has to run without them.
    """
    if block.training or is_tracing_or_exporting() or is_watched(block):
        return False
    return can_fuse_attention(block, x) or can_fuse_ffn(block, x)


def can_fuse_attention(block: Block, x: Tensor) -> bool:
    """Whether `gated_attention` can be the first half of a plain block in inference."""
    attn = block.attn
    if type(attn) is not GatedLinearAttention or attn.returns_state or attn.qk_norm is not None:
        return False
    arguments = arguments_of_attention(block)
    if not are_plain(block.norm1, arguments.values()) or why_not_attention(x, **arguments):
        return False
    return resolve_impl(attn.impl, 'gated_attention', None) == 'triton'


def can_fuse_ffn(block: Block, x: Tensor) -> bool:
    """Whether `ffn` can be the second half of a plain block in inference."""
    if type(block.ffn) is not FFN or block.ffn.dwconv is not None:
        return False
    arguments = arguments_of_ffn(block)
    if not are_plain(block.norm2, arguments.values()) or why_not_ffn(x, **arguments):
        return False
    return resolve_impl(block.ffn.impl, 'ffn', None) == 'triton'


def are_plain(norm: nn.Module, arguments: Iterable[Any]) -> bool:
    """Whether a norm is a `LayerNorm` over channels, and all weights and biases are plain tensors.

    Quantised and distributed ones are of other types. Some may be missing.
    """
    if type(norm) is not LayerNorm or len(norm.normalized_shape) != 1:
        return False
    pairs = [pair for pair in arguments if isinstance(pair, tuple)]
    return all(type(y) is nn.Parameter or type(y) is Tensor for pair in pairs for y in pair)


def arguments_of_attention(block: Block) -> dict[str, Any]:
    """What `saga_kernels.gated_attention` takes of a block."""
    attn = block.attn
    layers = dict(norm=block.norm1, in_proj=attn.in_proj, proj=attn.proj)
    optional = dict(lepe=attn.lepe, output_gate=attn.output_gate)
    return dict(num_heads=attn.num_heads, gamma=block.gamma1, **weights_of(layers | optional))


def arguments_of_ffn(block: Block) -> dict[str, Any]:
    """What `saga_kernels.ffn` takes of a block."""
    layers = dict(norm=block.norm2, fc1=block.ffn.fc1, fc2=block.ffn.fc2)
    return dict(gamma=block.gamma2, **weights_of(layers))


def weights_of(layers: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Weight and bias of each layer; None for a layer that is not there."""
    return {
        name: None if layer is None else (layer.weight, layer.bias)
        for name, layer in layers.items()
    }


def fused_block(block: Block, x: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """The output of a plain block in inference, of which a half or both are fused kernels."""
    x, state = block.encode(x, mask), []
    if can_fuse_attention(block, x):
        options = dict(mask=mask, feature_map=block.attn.feature_map, norm_eps=block.norm1.eps)
        x = gated_attention(x, **arguments_of_attention(block), **options, impl='triton')
    else:
        x, *state = block.attend(x, mask)
    if can_fuse_ffn(block, x):
        x = ffn(x, **arguments_of_ffn(block), eps=block.norm2.eps, impl='triton')
    else:
        x = block.feed_forward(x, mask)
    return (x, *state) if state else x
