"""Keeps large maps in memory-mapped files, in half precision, or both."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saga_kernels import is_tracing_or_compiling

# Maps with fewer bytes stay in memory, in full precision. The need of a backbone is measured on
# small images, whose large maps must be kept as those of large images are.
SMALLEST = 2**20


class Storage(NamedTuple):
    """How large maps are kept.

    Attributes:
        folder: Where their files go, or None for memory.
        dtype: Of the maps that are kept, or None for that of what is written to them.
        full: The dtype to compute in.
    """

    folder: Path | None = None
    dtype: torch.dtype | None = None
    full: torch.dtype = torch.float32


PLAIN = Storage()
_storage: ContextVar[Storage] = ContextVar('storage', default=PLAIN)


@contextlib.contextmanager
def store_maps(
    folder: str | os.PathLike | None = None,
    dtype: torch.dtype | None = None,
    full: torch.dtype = torch.float32,
) -> Iterator[None]:
    """Keep the large maps of backbones on a CPU in files, in half precision, or both.

    The system writes the pages of the files to the disk when memory runs short, and reads them
    back. The files are gone when the maps are.

    Args:
        folder: Where the files go; None for maps in memory.
        dtype: Of the maps that are kept, torch.float16 or torch.bfloat16. Their rows are converted
            to `full` for each computation. None for maps as they are computed.
        full: The dtype of the weights.

    Raises:
        ValueError: `dtype` is another one.
    """
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f'maps_dtype must be torch.float16 or torch.bfloat16, got {dtype!r}')
    token = _storage.set(Storage(None if folder is None else Path(folder), dtype, full))
    try:
        yield
    finally:
        _storage.reset(token)


def chosen_storage() -> Storage:
    """How large maps are kept in this context."""
    return _storage.get()


def bytes_in_memory(maps: Iterable[Tensor]) -> int:
    """Bytes of maps that do not share memory, without those that are in files."""
    return sum(map_.nbytes for map_ in maps if map_.untyped_storage().filename is None)


def is_large(like: Tensor, shape: torch.Size) -> bool:
    return like.device.type == 'cpu' and shape.numel() * like.itemsize >= SMALLEST


def kept_dtype(like: Tensor, shape: Sequence[int]) -> torch.dtype:
    """The dtype of a map of this shape that holds values of the dtype of another one."""
    dtype = _storage.get().dtype
    if dtype is None or dtype.itemsize >= like.itemsize or not is_large(like, torch.Size(shape)):
        return like.dtype
    return dtype


def new_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A map without values, for values with the dtype and device of another one.

    Raises:
        OSError: It is to be in a file, and the folder is missing, or has no room for it.
    """
    folder, map_, dtype = _storage.get().folder, torch.Size(shape), kept_dtype(like, shape)
    if folder is None or not is_large(like, map_):
        return like.new_empty(map_, dtype=dtype)
    descriptor, name = tempfile.mkstemp(prefix='map_', dir=folder)
    try:
        # Without its blocks, a file that outgrows the disk would end the process.
        os.posix_fallocate(descriptor, 0, map_.numel() * dtype.itemsize)
        return torch.from_file(name, shared=True, size=map_.numel(), dtype=dtype).view(map_)
    finally:
        os.close(descriptor)
        os.unlink(name)


def write_map(part: Tensor, values: Tensor) -> None:
    """Write values to a part of a map from `new_map`.

    Raises:
        ValueError: A value is too large for the dtype of the map.
    """
    part.copy_(values)
    if part.dtype != values.dtype and not part.isfinite().all() and values.isfinite().all():
        raise ValueError(
            f'a map of the backbone has the value {values.abs().max():.4g}, but maps_dtype='
            f'{part.dtype} holds up to {torch.finfo(part.dtype).max:.4g}; torch.bfloat16 holds more'
        )


def full_dtype(map_: Tensor) -> torch.dtype:
    """The dtype to compute in with a map."""
    if is_tracing_or_compiling():
        return map_.dtype
    storage = _storage.get()
    is_kept = map_.dtype == storage.dtype and storage.full.itemsize > map_.itemsize
    return storage.full if is_kept else map_.dtype


def in_full(map_: Tensor) -> Tensor:
    """A map, or a part of one, in the dtype to compute in."""
    dtype = full_dtype(map_)
    return map_ if dtype == map_.dtype else map_.to(dtype)
