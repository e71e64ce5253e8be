"""The one place that picks an implementation.

- `impl='reference'` is the implementation in PyTorch, always.
- `impl='triton'` is the Triton kernel, or an error that says why it can't run.
- `impl='auto'` (default) is the Triton kernel where it can run, else PyTorch; the choice is logged
  once. What `torch.export` and `torch.jit.trace` record is PyTorch, since a kernel can't run where
  there is no Python. So is what forward-mode differentiation and `torch.func` differentiate, since
  the kernels only have a backward pass.
- The environment variable `SAGA_KERNELS_IMPL` replaces 'auto'; an explicit argument wins over it.
  'layer_norm=reference,depthwise_conv2d=reference' replaces it for these ops alone.

A Triton kernel takes float16, bfloat16 and float32, head dims from 8 to 128, and any strides as
long as the last axis is contiguous. It runs on NVIDIA GPUs of compute capability 8.0 and above, and
on AMD GPUs. On a CPU it runs only in Triton's interpreter, very slowly, for debugging: set
`TRITON_INTERPRET=1` before Python starts.
"""

import functools
import importlib.util
import logging
import os
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from .tracing import is_tracing_or_compiling, is_tracing_or_exporting
from .validation import check_impl, check_impls

Impl = Literal['auto', 'reference', 'triton']
ENV_VAR = 'SAGA_KERNELS_IMPL'

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = importlib.util.find_spec('triton') is not None

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str, str | None]] = set()


def resolve_impl(impl: str, op: str, why_not_triton: str | None) -> str:
    """Turn what the caller asked for into `'reference'` or `'triton'`.

    Args:
        impl: What the caller asked for, 'auto', 'reference' or 'triton'.
        op: Name of the op, for messages.
        why_not_triton: Why the Triton kernel can't take this input; None if it can.

    Raises:
        ValueError: `impl` or the environment variable has an unknown value.
        RuntimeError: `'triton'` was asked for, and can't run.
    """
    check_impl(impl)
    if impl == 'auto':
        impl = os.environ.get(ENV_VAR, 'auto')
        if '=' in impl:
            impl = check_impls(impl, ENV_VAR).get(op, 'auto')
        check_impl(impl, ENV_VAR)
    if impl == 'triton' and why_not_triton:
        raise RuntimeError(f"{op}: impl='triton' can't run: {why_not_triton}")
    if impl != 'auto':
        return impl
    if is_tracing_or_exporting():
        return 'reference'
    choice = 'reference' if why_not_triton else 'triton'
    if not is_tracing_or_compiling():
        _log_once(op, choice, why_not_triton)
    return choice


def why_not_triton(x: Tensor, *others: Tensor) -> str | None:
    """Why no Triton kernel can take an input, or None.

    Args:
        x: A packed projection (B, N, parts, H, D), or tokens without heads (B, N, C).
        others: Further inputs that can be differentiated.
    """
    device = x.device
    if not _HAS_TRITON:
        return 'triton is not installed'
    if device.type == 'cpu':
        if os.environ.get('TRITON_INTERPRET') != '1':
            return 'it needs a GPU, and the input is on the CPU'
    elif device.type != 'cuda':
        return f'it needs an NVIDIA or AMD GPU, and the input is on {device.type}'
    else:
        # To ask for it takes as long as a launch. A compiler warns that it ignores caches.
        known = _why_not_gpu if torch.compiler.is_compiling() else _known_why_not_gpu
        why = known(device)
        if why:
            return why
    if x.dtype not in TRITON_DTYPES:
        return f'it takes float16, bfloat16 and float32, not {x.dtype}'
    if x.ndim == 5 and not 8 <= x.shape[-1] <= 128:
        return f'it takes head dims 8 to 128, not {x.shape[-1]}'
    if x.stride(-1) != 1:
        return 'the last axis of the input is not contiguous'
    # To look at each tensor takes longer than to know that there is nothing to see.
    if torch.compiler.is_compiling() or not _other_derivatives_are_taken():
        return None
    if any(_has_other_derivatives(y) for y in (x, *others)):
        return 'it has a backward pass alone, not the derivatives of forward mode or torch.func'
    return None


def _other_derivatives_are_taken() -> bool:
    """Whether any code is differentiated in forward mode, or transformed by `torch.func`."""
    return forward_ad._current_level >= 0 or functorch.peek_interpreter_stack() is not None


def _why_not_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        # A fake tensor may claim to be on a GPU that is not there.
        return 'there is no GPU'
    if torch.version.hip is None and torch.cuda.get_device_properties(device).major < 8:
        return 'it needs a GPU of compute capability 8.0 or above'
    return None


_known_why_not_gpu = functools.cache(_why_not_gpu)


def _has_other_derivatives(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a transform of `torch.func` watches a tensor.

    A custom op would give them derivatives of zero, or an error that says nothing of this.
    """
    if is_tracing_or_compiling():
        return False
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return forward_ad.unpack_dual(x).tangent is not None


def kernels_of(op: str, *inputs: Tensor) -> Any:
    """The module `saga_kernels.<op>.kernel`.

    Raises:
        RuntimeError: No Triton kernel can take one of these inputs; it says why.
    """
    for x in inputs:
        why = why_not_triton(x)
        if why:
            raise RuntimeError(f"impl='triton' can't run: {why}")
    return _module(op)


@functools.cache
def _module(op: str) -> Any:
    # Triton is imported where a kernel runs, and nowhere else.
    return importlib.import_module(f'.{op}.kernel', __package__)


def _log_once(op: str, choice: str, why: str | None) -> None:
    if (op, choice, why) not in _logged:
        _logged.add((op, choice, why))
        logger.info('%s runs as %s%s', op, choice, f' ({why})' if why else '')
