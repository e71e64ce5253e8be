"""Chunks of a chosen size, and bfloat16 in Triton's interpreter."""

import importlib.util

import pytest
import torch

from saga_kernels import chunks


@pytest.fixture
def chunk_budget(monkeypatch):
    """Sets the bytes of the largest temporary of a chunk."""
    return lambda size: monkeypatch.setattr(chunks, 'BUDGET', size)


def _repair_bfloat16():
    """Give the interpreter a GPU's bfloat16.

    As shipped (Triton 3.9), it keeps bfloat16 as uint16, multiplies these integers in `tl.dot`, and
    truncates where a GPU rounds to nearest even.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(operand):
        return cast(None, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand

    def dot(self, a, b, *rest):
        return create_dot(self, widen(a), widen(b), *rest)

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dtype)
        rounded = torch.as_tensor(source.data.copy()).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = dot
    InterpreterBuilder.cast_impl = cast_impl


if importlib.util.find_spec('triton') and not torch.cuda.is_available():
    _repair_bfloat16()
