"""Keeps large maps in memory-mapped files, in place of memory."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

# Maps with fewer bytes stay in memory. The need of a backbone is measured on small images, whose
# large maps must go where those of large images go.
SMALLEST = 2**20
_folder: ContextVar[Path | None] = ContextVar('folder', default=None)


@contextlib.contextmanager
def maps_on_disk(folder: str | os.PathLike | None) -> Iterator[None]:
    """Keep the large maps of backbones in files that are gone when the maps are.

    The system writes their pages to the disk when memory runs short, and reads them back.

    Args:
        folder: Where the files go; None for maps in memory.
    """
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


def bytes_in_memory(maps: Iterable[Tensor]) -> int:
    """Bytes of maps that do not share memory, without those that are in files."""
    return sum(map_.nbytes for map_ in maps if map_.untyped_storage().filename is None)


def new_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A map without values, with the dtype and device of another one.

    Raises:
        OSError: It is to be in a file, and the folder is missing, or has no room for it.
    """
    folder, map_ = _folder.get(), torch.Size(shape)
    size = map_.numel() * like.itemsize
    if folder is None or size < SMALLEST or like.device.type != 'cpu':
        return like.new_empty(map_)
    descriptor, name = tempfile.mkstemp(prefix='map_', dir=folder)
    try:
        # Without its blocks, a file that outgrows the disk would end the process.
        os.posix_fallocate(descriptor, 0, size)
        return torch.from_file(name, shared=True, size=map_.numel(), dtype=like.dtype).view(map_)
    finally:
        os.close(descriptor)
        os.unlink(name)
