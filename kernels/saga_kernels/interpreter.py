"""bfloat16 in Triton's interpreter, which runs kernels on CPU tensors to debug and to test them."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@contextlib.contextmanager
def bfloat16_of_a_gpu() -> Iterator[None]:
    """Kernels that run meanwhile get a GPU's bfloat16.

    Triton (3.9) keeps bfloat16 as integers of 16 bits, which it multiplies as such in `tl.dot`, and
    truncates where a GPU rounds to the nearest, ties to even.
    """
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(self: InterpreterBuilder, operand: TensorHandle) -> TensorHandle:
        is_bfloat16 = operand.dtype.scalar == tl.bfloat16
        return cast_impl(self, operand, tl.float32) if is_bfloat16 else operand

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(self, a), widened(self, b), *rest)

    def cast(self: InterpreterBuilder, source: TensorHandle, dtype: Any) -> TensorHandle:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast_impl(self, source, dtype)
        rounded = torch.as_tensor(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    try:
        yield
    finally:
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
