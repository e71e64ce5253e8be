"""Runs the second half of plain blocks as one kernel, for inference on a GPU.

The FFN computes maps that have several times as many channels as its input. The kernel keeps them
on the chip, as chunks of rows keep them in the cache of a CPU.
"""

from typing import Any

from torch import Tensor, nn

from saga_kernels import ffn
from saga_kernels.dispatch import resolve_impl
from saga_kernels.ffn.api import why_not_kernel
from saga_kernels.tracing import is_tracing_or_exporting

from ..layers import FFN, Block, LayerNorm, is_watched


def can_fuse(block: Block, x: Tensor) -> bool:
    """Whether norm, FFN and residual of a plain block can be one kernel, and no caller can tell.

    Compiled code takes the kernel as well. Exported code has to run without it.
    """
    if block.training or type(block.ffn) is not FFN or block.ffn.dwconv is not None:
        return False
    if type(block.norm2) is not LayerNorm or len(block.norm2.normalized_shape) != 1:
        return False
    arguments = arguments_of(block)
    # Quantised and distributed parameters are of other types. Those of a norm may be missing.
    parameters = [y for pair in arguments[:3] for y in pair]
    if is_tracing_or_exporting() or not all(
        type(y) is nn.Parameter or type(y) is Tensor for y in parameters
    ):
        return False
    if why_not_kernel(x, *arguments) is not None:
        return False
    return resolve_impl(block.ffn.impl, 'ffn', None) == 'triton' and not is_watched(block)


def arguments_of(block: Block) -> tuple[Any, ...]:
    """What `saga_kernels.ffn` takes: weights and biases of norm, fc1 and fc2, and layer scale."""
    layers = block.norm2, block.ffn.fc1, block.ffn.fc2
    return *((layer.weight, layer.bias) for layer in layers), block.gamma2


def fused_block(block: Block, x: Tensor, mask: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """The output of a plain block in inference, whose second half is one kernel."""
    x, *state = block.attend(x, mask)
    *layers, gamma = arguments_of(block)
    x = ffn(x, *layers, gamma=gamma, eps=block.norm2.eps, impl='triton')
    return (x, *state) if state else x
