"""Measures time and peak memory of a function in this process, and makes images for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# A function is called until this many seconds have passed, but at most so often. An eighth of them
# is enough for a GPU, whose times vary less.
SECONDS, MOST = 4, 200


def timed(step: Callable[[], object], device: torch.device) -> list[float]:
    """Call `step`, which computes on `device`, several times; return the seconds of each call."""
    times: list[float] = []
    seconds = SECONDS / 8 if device.type == 'cuda' else SECONDS
    while not times or (sum(times) < seconds and len(times) < MOST):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def captured(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Record what `step` does on a GPU as a CUDA graph; return a function that does it again."""
    with torch.cuda.device(device):
        # As PyTorch wants it: a first call on another stream than the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def added_memory(step: Callable[[], object], device: torch.device) -> int:
    """Call `step`; return the bytes of memory that it adds at its peak.

    Raises:
        OSError: The system is not Linux, and reports no peak of resident memory.
    """
    if device.type == 'cuda':
        # The first call on a GPU needs more memory, to choose algorithms. On a CPU there is no such
        # call, because its freed memory would be used again.
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
    """Bytes that are in use: by tensors on a GPU, or by the process."""
    if device.type == 'cuda':
        return torch.cuda.memory_allocated(device)
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(f'{kind}:'):
            return 1024 * int(line.split()[1])
    raise OSError('/proc/self/status reports no resident memory: Linux is needed')


def peak(device: torch.device) -> int:
    """The largest number of bytes in use since `reset_peak`."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return memory(device, 'VmHWM')


def reset_peak(device: torch.device) -> None:
    """Let `peak` start anew from the bytes that are in use."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path('/proc/self/clear_refs').write_text('5')


def random_images(
    backbone: nn.Module, size: tuple[int, int, int], device: torch.device | str
) -> Tensor:
    """Random images with as many channels as a backbone takes, and no padding.

    Args:
        backbone: Others than those of this project take three channels.
        size: Images, height and width.
        device: Where they are made.

    Returns:
        (B, C, H, W), float32.
    """
    count, height, width = size
    channels = getattr(backbone, 'input_channels', 3)
    images = torch.randn(count, channels, height, width, device=device)
    if channels > 3:
        # a mask of the padding, behind the channels of the image
        images[:, getattr(backbone, 'in_channels', 3) :] = 1
    return images
