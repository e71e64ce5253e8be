"""Counts FLOPs, parameters and activations of a model, for each of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    conv_flop_count,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)


def _sdpa(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _sdpa_backward(grad, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _convolution_backward(
    grad, x, weight, _bias, _stride, _padding, _dilation, transposed, _out_padding, _groups,
    output_mask, out_shape=None,
) -> int:  # fmt: skip
    gradients = sum(output_mask[:2])
    return gradients * conv_flop_count(x, weight, grad, transposed=transposed)


# Formulas for operations that torch's counter does not know, and for the gradient of a convolution
# with respect to its weight, where it takes each group to be as wide as the map. The ops of
# saga_kernels register their own formulas.
FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


class _Uses(TorchDispatchMode):
    """Context that records which memory the operations read, to find parameters without a use."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.read |= {x.untyped_storage()._cdata for x in tensors if x.layout is torch.strided}
        return func(*args, **kwargs)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.read


@dataclass(frozen=True)
class Cost:
    """The cost of a module.

    Attributes:
        flops: Floating-point operations of the forward pass, two per multiply-add: matrix products,
            convolutions and attention. Element-wise operations, norms and sums are not counted.
        parameters: Number of parameters. Parameters that several modules share count in each of
            them.
        activations: Bytes that autograd keeps for the backward pass. Each memory block counts in
            the module that needs it first. None without `grad`.
        unused: Number of parameters that no operation reads.
    """

    flops: int
    parameters: int
    activations: int | None
    unused: int


def measure_cost(
    model: nn.Module, forward: Callable[[], object], grad: bool = True
) -> dict[str, Cost]:
    """Measure the cost of every module, by its name in `model`; '' is the model itself.

    Args:
        model: The model, in the mode and on the device to measure.
        forward: Calls the model once. Its result is kept until everything is counted, so that no
            memory block is used twice.
        grad: Whether to run with autograd and count activations.
    """
    names = {module: name for name, module in model.named_modules()}
    # Of the forward pass of a module, without those of its children.
    flops: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    # Identified by their storage, because fake tensors have storages, but no memory addresses.
    fixed = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    uses = _Uses()
    running = ['']

    def charge() -> None:
        flops[running[-1]] += counter.get_total_flops() - flops.total()

    def enter(module: nn.Module, *_: object) -> None:
        charge()
        running.append(names[module])

    def leave(*_: object) -> None:
        charge()
        running.pop()

    def keep(x: Tensor) -> Tensor:
        block = x.untyped_storage()
        if block._cdata not in fixed:
            fixed.add(block._cdata)
            activations[running[-1]] += block.nbytes()
        return x

    with ExitStack() as stack:
        for module in names:
            for hook in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ):
                stack.callback(hook.remove)
        if not grad:
            # the counter wants a gradient function of inputs with `requires_grad`, which a part of
            # a parameter, as `split` gives it, has not
            for parameter in [p for p in model.parameters() if p.requires_grad]:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x))
        stack.enter_context(counter)
        stack.enter_context(uses)
        output = forward()
    charge()
    del output

    def total(values: Counter, name: str) -> int:
        prefix = f'{name}.' if name else ''
        return sum(n for key, n in values.items() if key == name or key.startswith(prefix))

    return {
        name: Cost(
            flops=total(flops, name),
            parameters=sum(p.numel() for p in module.parameters()),
            activations=total(activations, name) if grad else None,
            unused=sum(p.numel() for p in module.parameters() if p not in uses),
        )
        for module, name in names.items()
    }
