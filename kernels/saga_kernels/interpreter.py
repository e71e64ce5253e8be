"""Triton's interpreter, which runs kernels on CPU tensors to debug and to test them, repaired."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ScanOps, TensorHandle


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Kernels that run meanwhile get a GPU's bfloat16, and scans that take seconds, not minutes.

    Triton (3.9) keeps bfloat16 as integers of 16 bits, which it multiplies as such in `tl.dot`, and
    truncates where a GPU rounds to the nearest, ties to even. It calls the function of
    `tl.associative_scan` for each element.
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

    with (
        mock.patch.multiple(InterpreterBuilder, create_dot=dot, cast_impl=cast),
        mock.patch.object(ScanOps, 'generic_scan', _scan),
    ):
        yield


def _scan(self: ScanOps, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """An inclusive scan that doubles what each element covers in every step, as a GPU does."""
    types = [x.dtype for x in inputs]
    scanned = [x.handle.data.swapaxes(0, self.axis) for x in inputs]
    step = 1
    while step < len(scanned[0]):
        shifted = [x[range(-step, len(x) - step)] for x in scanned]
        joined = self.combine_fn.fn(*map(self.to_tensor, shifted + scanned, 2 * types))
        scanned = [x.copy() for x in scanned]
        for x, y in zip(scanned, joined, strict=True):
            x[step:] = y.handle.data[step:]
        step *= 2
    return [
        self.to_tensor(x.swapaxes(0, self.axis), dtype)
        for x, dtype in zip(scanned, types, strict=True)
    ]
