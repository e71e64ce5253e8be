"""How Triton kernels become PyTorch ops, which autograd, compilers, exports and FLOP counters see.

`torch.library.custom_op` does the same, but takes longer for a call than the launches themselves:
it supports ops that change their inputs, and checks every result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

LIBRARY = torch.library.Library('saga_kernels', 'FRAGMENT')


def register(schema: str, run: Callable, fake: Callable) -> OpOverload:
    """Define an op that changes no input and returns new tensors.

    It can't be differentiated until `register_autograd` says how.

    Args:
        schema: Name, arguments and results, as in `f(Tensor x, float eps) -> Tensor`.
        run: What the op does, on every device.
        fake: Takes the same arguments, and makes tensors of the sizes that `run` would return.
    """
    name = LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    # A compiler that looks at the code around an op must not look into the op.
    LIBRARY.impl(name, torch.compiler.disable(run), 'CompositeExplicitAutograd')
    torch.library.register_fake(f'saga_kernels::{name}', fake, lib=LIBRARY)
    return getattr(torch.ops.saga_kernels, name).default


def register_autograd(op: OpOverload, save: Callable, differentiate: Callable) -> Callable:
    """Say how an op is differentiated, once.

    Args:
        op: From `register`.
        save: Takes the context of `torch.autograd.Function`, the inputs and the results.
        differentiate: Takes the context and the gradients of the results, which are None where
            there is none; returns those of the inputs.

    Returns:
        A function that does what the op does, in less time. A call of the op goes through PyTorch's
        dispatcher twice: to find its gradient, and to find what it runs. The function finds the
        gradient by itself. A compiler that records the function records the op.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                results = op(*inputs)
            # Otherwise autograd makes gradients of zeros for results that have none.
            ctx.set_materialize_grads(False)
            save(ctx, inputs, results)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if torch.is_grad_enabled():
                return differentiate(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return differentiate(ctx, *grads)

    def call(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    def call_or_record(*inputs: Any) -> Tensor | tuple[Tensor, ...]:
        return op(*inputs) if torch.compiler.is_compiling() else call(*inputs)

    Differentiable.__name__ = op._schema.name
    LIBRARY.impl(op._opname, torch.compiler.disable(call), 'Autograd')
    return call_or_record


def refuse_double_backward(op: OpOverload) -> None:
    """Make the gradient of an op that is itself a gradient an error."""
    refuse_backward(op, 'no double backward')


def refuse_backward(op: OpOverload, what: str = 'no backward pass') -> Callable:
    """Make the gradient of an op an error, which says what the kernel has not.

    Returns a function like that of `register_autograd`.
    """

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"the Triton kernel has {what}; use impl='reference'")

    return register_autograd(op, _keep_nothing, refuse)


def _keep_nothing(ctx: Any, inputs: tuple, results: Any) -> None:
    pass
