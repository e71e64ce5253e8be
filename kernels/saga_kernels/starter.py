"""The launch itself: compiled kernels are called without Triton's launcher, which takes longer.

Only kernel modules import this one, because it imports Triton.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from .launch import (
    Launch,
    alignment,
    compile_options,
    decay_chunk,
    is_nvidia,
    meaningful,
    padded_dim,
    plan,
    processors,
    product_precision,
)

try:
    from triton import knobs
except ImportError:
    # Before Triton 3.4, profilers were called elsewhere.
    knobs = None


class Starter:
    """Launches one kernel on one GPU, with numbers that stay the same; only the tensors differ.

    Triton compiles a kernel anew for some properties of its arguments, and to find these out takes
    its launcher several times as long as the launch. Of a pointer, they are the dtype, and whether
    16 divides the address; of a number, its type and value, which are fixed here. So the compiled
    kernel is looked up by the dtypes and addresses, and called directly. On an AMD GPU, Triton also
    looks at the size of the memory behind a pointer, so that its launcher is called there.

    Args:
        kernel: Made by `triton.jit`.
        device: Of the tensors.
        launch: The grid, and the number of warps.
        numbers: All arguments that are no tensors, and maybe others, which are left out.
    """

    def __init__(
        self, kernel: Any, device: torch.device, launch: Launch, numbers: dict[str, Any]
    ) -> None:
        self.kernel, self.device, self.launch = kernel, device, launch
        self.values = [numbers.get(name) for name in kernel.arg_names]
        self.pointers = [(i, n) for i, n in enumerate(kernel.arg_names) if n not in numbers]
        # Functions that launch a compiled kernel, by dtypes and alignment of the tensors.
        self.compiled: dict[tuple, Callable] = {}

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch the kernel; on a CPU, interpret it."""
        values = self.values.copy()
        key: list[Any] = []
        for i, name in self.pointers:
            x = values[i] = tensors[name]
            key += (None,) if x is None else (x.dtype, x.data_ptr() % 16 == 0)
        launch = self.compiled.get(tuple(key))
        with _on_device(self.device):
            if launch is not None:
                launch(*values)
                return
            programs, amd = self.launch.programs, torch.version.hip is not None
            options = compile_options(self.launch.num_warps, amd)
            compiled = self.kernel[(programs,)](*values, **options)
            # The interpreter returns None.
            if not amd and compiled is not None:
                self.compiled[tuple(key)] = _launcher(compiled, programs)


def _launcher(compiled: Any, programs: int) -> Callable:
    """A function that launches a compiled kernel; it takes all arguments of the kernel.

    Triton's own function describes each launch for profilers, which takes longer than the launch.
    So it is called only if a profiler listens.
    """
    by_triton = compiled[programs, 1, 1]
    if knobs is None:
        return by_triton
    hooks, gpu = knobs.runtime, driver.active
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(*values: Any) -> None:
        if _listens(hooks.launch_enter_hook) or _listens(hooks.launch_exit_hook):
            by_triton(*values)
            return
        stream = gpu.get_current_stream(gpu.get_current_device())
        run(programs, 1, 1, stream, function, metadata, None, None, None, *values)

    return launch


def _listens(hook: Any) -> bool:
    """Whether a hook of Triton, which may be a chain of functions, calls any."""
    return bool(getattr(hook, 'calls', hook))


_HERE = contextlib.nullcontext()


def _on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which kernels are launched on a GPU, or interpreted on a CPU."""
    # To enter a context that changes nothing would take as long as the launch.
    if device.type == 'cuda':
        return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)
    from .interpreter import repaired

    return repaired()


def starters_of(op: str, *kernels: Any) -> Callable[..., tuple[Starter, ...]]:
    """A function that returns what launches the kernels of one pass of an op.

    It remembers what it returned. It looks up all kernels at once, because a lookup takes a good
    part of the time of a launch.

    Args:
        op: Name of the op, a key of `KERNELS`.
        kernels: Made by `triton.jit`.
    """

    # `typed` tells 1 from True.
    @functools.lru_cache(4096, typed=True)
    def look_up(*layout: Any, **numbers: Any) -> tuple[Starter, ...]:
        return tuple(_starter(op, kernel, *layout, **numbers) for kernel in kernels)

    def starters(
        packed: Tensor, mask: Tensor | None, grad: Tensor | None = None, **numbers: Any
    ) -> tuple[Starter, ...]:
        """What launches the kernels over the tokens of a packed projection (B, N, parts, H, D).

        Args:
            packed: The packed projection.
            mask: (B, N), or None.
            grad: The gradient of the output (B, N, H, D), if any kernel takes it.
            numbers: Arguments of one or more kernels that follow from none of these.
        """
        return look_up(
            packed.device, packed.dtype, packed.shape, packed.stride(),
            None if mask is None else mask.stride(), None if grad is None else grad.stride(),
            **numbers,
        )  # fmt: skip

    return starters


def _starter(
    op: str,
    kernel: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    mask_stride: tuple[int, int] | None,
    grad_stride: tuple[int, int, int, int] | None,
    **numbers: Any,
) -> Starter:
    batch, tokens, parts, heads, dim = shape
    launch = plan(op, kernel.__name__, dtype, dim, batch * heads, tokens, processors(device))
    x_b, x_n, x_p, x_h, _ = meaningful(shape, stride)
    steps = dict(x_b=x_b, x_n=x_n, x_p=x_p, x_h=x_h)
    if grad_stride is not None:
        do_b, do_n, do_h, _ = meaningful((batch, tokens, heads, dim), grad_stride)
        steps |= dict(do_b=do_b, do_n=do_n, do_h=do_h)
    known = [step for name, step in steps.items() if name in kernel.arg_names]
    numbers |= steps
    numbers |= dict(zip(('mask_b', 'mask_n'), mask_stride or (0, 0), strict=True))
    numbers |= dict(
        N=tokens, H=heads, SPAN=launch.span, D=dim, BD=padded_dim(dim), BN=launch.block,
        ALIGN=alignment(dim, *known), PARTS=parts, GATED=parts == 5,
        L=decay_chunk(dtype, dim), PRECISION=product_precision(dim, is_nvidia(device)),
    )  # fmt: skip
    return Starter(kernel, device, launch, numbers)
