"""Counts the bytes of the tensors that are alive while code runs."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operators return in the context, on any device.

    Memory is counted once for all views of it. Memory-mapped files, and what an operator allocates
    and frees inside of itself, are not counted.

    Args:
        fake: Count the memory that fake tensors stand for, in place of that of real ones. Defaults
            to False.

    Attributes:
        now: Bytes of tensors that are alive.
        peak: The largest number of bytes so far.
        largest: Bytes of the largest tensor so far.
    """

    def __init__(self, fake: bool = False) -> None:
        super().__init__()
        self.fake = fake
        self.now = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id_of(leaf) not in self._seen | inputs:
                self._add(leaf.untyped_storage(), is_file=func is torch.ops.aten.from_file.default)
        return out

    def _add(self, storage: torch.UntypedStorage, is_file: bool) -> None:
        # fake tensors contain tensors on the meta device
        if (storage.device.type == 'meta') is not self.fake:
            return
        key, size = storage._cdata, 0 if is_file else storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def id_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata
