"""Memory of a process that computes on a CPU."""

import ctypes
import platform

# mallopt(3): parameters, and the value that stops trimming
M_TRIM_THRESHOLD, M_MMAP_MAX, NEVER = -1, -4, -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that its tensors free, for those that follow.

    glibc returns blocks of more than 32 MiB to the system when they are freed, which fills the next
    ones with zeros, page by page: docs/benchmarks/speed.md has what that costs large images. Blocks
    kept may lie so that the next ones don't fit: the process can grow larger.

    Returns:
        Whether the C library is one that this works with, which is glibc.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, NEVER))
