"""Runs the halves of plain blocks as fused kernels, for inference on a GPU.

Attention computes several maps of its input, and the FFN maps that have several times as many
channels. The kernels keep them on the chip, as chunks of rows keep them in the cache of a CPU.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from saga_kernels import ffn, gated_attention
from saga_kernels.dispatch import resolve_impl
from saga_kernels.ffn.api import why_not_kernel as why_not_ffn
from saga_kernels.gated_attention.api import why_not_kernel as why_not_attention
from saga_kernels.tracing import is_tracing_or_exporting

from ..attention import GatedLinearAttention
from ..layers import FFN, Block, LayerNorm, is_watched


class FusedHalves(NamedTuple):
    """What the kernels of the halves of a block take besides a map; None for a half without one."""

    attention: dict[str, Any] | None
    ffn: dict[str, Any] | None


def fused_halves(block: Block, x: Tensor) -> FusedHalves | None:
    """The halves of a plain block that run as fused kernels, or None if no half does.

    A half that a caller could tell from the plain one does not. Compiled code takes the kernels as
    well. Exported code has to run without them.
    """
    if block.training or is_tracing_or_exporting() or is_watched(block):
        return None
    halves = FusedHalves(fused_attention(block, x), fused_ffn(block, x))
    return halves if any(half is not None for half in halves) else None


def fused_attention(block: Block, x: Tensor) -> dict[str, Any] | None:
    """What `gated_attention` takes as the first half of a block in inference, if it can be it."""
    attn = block.attn
    if type(attn) is not GatedLinearAttention or attn.returns_state or attn.qk_norm is not None:
        return None
    layers = dict(norm=block.norm1, in_proj=attn.in_proj, proj=attn.proj)
    optional = dict(lepe=attn.lepe, output_gate=attn.output_gate)
    weights: dict[str, Any] = weights_of(layers | optional)
    options: dict[str, Any] = dict(num_heads=attn.num_heads, gamma=block.gamma1)
    if not are_plain(block.norm1, weights.values()) or why_not_attention(x, **options, **weights):
        return None
    if resolve_impl(attn.impl, 'gated_attention', None) != 'triton':
        return None
    return weights | options | dict(feature_map=attn.feature_map, norm_eps=block.norm1.eps)


def fused_ffn(block: Block, x: Tensor) -> dict[str, Any] | None:
    """What `ffn` takes as the second half of a block in inference, if it can be it."""
    if type(block.ffn) is not FFN or block.ffn.dwconv is not None:
        return None
    layers = dict(norm=block.norm2, fc1=block.ffn.fc1, fc2=block.ffn.fc2)
    weights: dict[str, Any] = weights_of(layers)
    options: dict[str, Any] = dict(gamma=block.gamma2)
    if not are_plain(block.norm2, weights.values()) or why_not_ffn(x, **options, **weights):
        return None
    if resolve_impl(block.ffn.impl, 'ffn', None) != 'triton':
        return None
    return weights | options | dict(eps=block.norm2.eps)


def are_plain(norm: nn.Module, weights: Iterable[tuple[Tensor, Tensor] | None]) -> bool:
    """Whether a norm is a `LayerNorm` over channels, and all weights and biases are plain tensors.

    Quantised and distributed ones are of other types. Some may be missing.
    """
    if type(norm) is not LayerNorm or len(norm.normalized_shape) != 1:
        return False
    pairs = [pair for pair in weights if pair is not None]
    return all(type(y) is nn.Parameter or type(y) is Tensor for pair in pairs for y in pair)


def weights_of(layers: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor] | None]:
    """Weight and bias of each layer; None for a layer that is not there."""
    return {
        name: None if layer is None else (layer.weight, layer.bias)
        for name, layer in layers.items()
    }


def fused_block(
    block: Block, x: Tensor, mask: Tensor | None, halves: FusedHalves
) -> Tensor | tuple[Tensor, ...]:
    """The output of a plain block in inference, with the halves that `fused_halves` found."""
    x, state = block.encode(x, mask), []
    if halves.attention:
        x = gated_attention(x, **halves.attention, mask=mask, impl='triton')
    else:
        x, *state = block.attend(x, mask)
    x = ffn(x, **halves.ffn, impl='triton') if halves.ffn else block.feed_forward(x, mask)
    return (x, *state) if state else x
