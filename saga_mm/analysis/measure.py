"""Time and peak memory of a piece of work, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# Seconds of work that are timed, and the fewest and most repeats of it.
SECONDS, FEWEST, MOST = 4, 2, 200


def timed(step: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each of several calls of `step`, which computes on `device`."""
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < SECONDS and len(times) < MOST):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def added_memory(step: Callable[[], object], device: torch.device) -> int:
    """Bytes of memory by which a call of `step` exceeds, at its peak, what is there before.

    Raises:
        OSError: The system tells no peak of resident memory, as Linux does.
    """
    if device.type == 'cuda':
        # the first run needs more, to choose algorithms; on a CPU, it finds no memory to use again
        step()
    reset_peak(device)
    before = memory(device)
    step()
    return max(0, peak(device) - before)


def synchronize(device: torch.device) -> None:
    """Wait until all work on a GPU is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def memory(device: torch.device, kind: str = 'VmRSS') -> int:
    """Bytes in use now: of tensors on a GPU, or of the process."""
    if device.type == 'cuda':
        return torch.cuda.memory_allocated(device)
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{kind}:'):
            return 1024 * int(line.split()[1])
    raise OSError('/proc/self/status tells no resident memory: Linux is needed')


def peak(device: torch.device) -> int:
    """Most bytes in use since `reset_peak`."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return memory(device, 'VmHWM')


def reset_peak(device: torch.device) -> None:
    """Let `peak` start again from what is in use now."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path('/proc/self/clear_refs').write_text('5')
