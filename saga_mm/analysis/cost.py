"""FLOPs, parameters and activations of a model, whole and module by module."""

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


# What torch's counter does not know, and would count nothing for; and the gradient of a convolution
# by its weight, for which it takes each group to be as wide as the map. The ops of saga_kernels
# bring theirs.
FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


class _Uses(TorchDispatchMode):
    """Context that remembers the memory of all tensors that operations read."""

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
    """What a module costs.

    Attributes:
        flops: Floating-point operations of the forward pass, two per multiply-add: matrix products,
            convolutions and attention. Element-wise operations, norms and sums are not counted.
        parameters: Number of parameters; those that several modules share are in each of them.
        activations: Bytes that autograd keeps for the backward pass, each memory block in the
            module that needed it first. None without `grad`.
        unused: Number of those parameters that no operation reads.
    """

    flops: int
    parameters: int
    activations: int | None
    unused: int


def measure_cost(
    model: nn.Module, forward: Callable[[], object], grad: bool = True
) -> dict[str, Cost]:
    """Cost of every module, by its name in `model`; '' is the model itself.

    Args:
        model: The model, in the mode and on the device that are wanted.
        forward: Calls it once, on an input of the wanted size. What it returns is kept until all
            is counted, so that no memory block is used twice.
        grad: Run with autograd, and count activations.
    """
    names = {module: name for name, module in model.named_modules()}
    # What happens in the forward of a module, outside those of its children.
    flops: Counter[str] = Counter()
    activations: Counter[str] = Counter()
    # Shapes without memory, of torch's FakeTensorMode, have storages too, but no addresses.
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
