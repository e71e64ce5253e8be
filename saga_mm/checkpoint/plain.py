"""What a checkpoint may hold: tensors and plain data, made anew from what was read.

torch reads a checkpoint without running anything in it (`weights_only=True`), but for classes and
functions on a list, which it calls with arguments from the file. Training checkpoints of mmengine
need numpy arrays and `HistoryBuffer`s, whose own functions trust their arguments: numpy can be told
to follow a pointer. So the list holds stand-ins, which only take notes, and check them.
`make_plain` turns what was read into data: everything in it is of a known type.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from torch import Tensor, nn

# Besides containers. Those of torch are names of things, and nothing can be done with them.
PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.Size,
    torch.device,
    torch.dtype,
    torch.layout,
    torch.qscheme,
)
# The functions that a scheduler may have in its state.
ANNEALING = (OneCycleParamScheduler._annealing_cos, OneCycleParamScheduler._annealing_linear)
STATISTICS = ('current', 'max', 'mean', 'min')


class DtypeNote:
    """Stands in for `numpy.dtype` in a file: numbers only, in either byte order."""

    __slots__ = ('dtype',)

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r'[biufc]\d{1,2}', code):
            raise _forbidden(f'numpy.dtype({code!r})')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        # Version and byte order. Flags, fields and sizes follow, which numbers do not need.
        order = state[1]
        if order not in ('<', '>', '=', '|'):
            raise _forbidden(f'numpy.dtype in the byte order {order!r}')
        self.dtype = self.dtype.newbyteorder(order)


class ArrayNote:
    """Stands in for `numpy.ndarray` in a file."""

    __slots__ = ('state',)

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def make(self) -> np.ndarray:
        """The array, copied out of the file; numbers only."""
        *_, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, DtypeNote) or not isinstance(data, bytes):
            raise _forbidden('numpy.ndarray without bytes and a dtype of numbers')
        return _numbers(dtype, data).reshape(shape, order='F' if is_fortran else 'C')


class ObjectNote:
    """Stands in for a class of which a file holds the attributes."""

    __slots__ = ('state',)

    def __setstate__(self, state: dict) -> None:
        self.state = state


class HistoryNote(ObjectNote):
    """Stands in for `HistoryBuffer` in a file."""

    __slots__ = ()

    def make(self, copy: Callable[[Any], Any]) -> HistoryBuffer:
        """The buffer, without the statistics methods of the file: those of the class hold."""
        logs, counts = (copy(self.state[name]) for name in ('_log_history', '_count_history'))
        length = self.state['max_length']
        if not all(
            isinstance(series, np.ndarray) and series.ndim == 1 for series in (logs, counts)
        ):
            raise _forbidden('HistoryBuffer without two series of numbers')
        if len(logs) != len(counts) or type(length) is not int or length < len(logs):
            raise _forbidden(f'HistoryBuffer with other lengths than its max_length={length!r}')
        return HistoryBuffer(logs, counts, max_length=length)


class OneCycleNote:
    """Stands in for the scheduler whose state names one of its functions."""

    __slots__ = ()


def stand_ins() -> dict[str, Callable]:
    """What stands in for which name in a file. numpy 1 and 2 write different ones."""
    known: dict[str, Callable] = {
        'argparse.Namespace': ObjectNote,
        'builtins.bytes': _no_bytes,
        'builtins.getattr': _method,
        'numpy.dtype': DtypeNote,
        'numpy.ndarray': ArrayNote,
        _name(ConfigDict): _config,
        _name(HistoryBuffer): HistoryNote,
        _name(OneCycleParamScheduler): OneCycleNote,
    }
    for core in ('core', '_core'):
        known[f'numpy.{core}.multiarray._reconstruct'] = _reconstruct
        known[f'numpy.{core}.multiarray.scalar'] = _scalar
    return known


def make_plain(value: Any, size: int, trusted: Collection[type] = ()) -> Any:
    """A copy of what was read from a file, but for tensors, which share their memory with it.

    Args:
        value: What torch read, with stand-ins in it.
        size: Bytes of the file: more can't be in arrays, unless many are made of the same bytes.
        trusted: Further classes whose objects are taken as they are.

    Raises:
        pickle.UnpicklingError: There is something that is neither a tensor nor plain data, or a
            container that holds itself.
        RecursionError: Containers lie too deeply in each other.
    """
    return _Copy(size, trusted).copy(value)


class _Copy:
    def __init__(self, size: int, trusted: Collection[type]) -> None:
        self.size = size
        self.trusted = trusted
        # by id; None while a container is not complete
        self.copies: dict[int, Any] = {}

    def copy(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN or isinstance(value, np.number | np.bool_):
            return value
        if id(value) in self.copies:
            copy = self.copies[id(value)]
            if copy is None:
                raise pickle.UnpicklingError(f'a {kind.__name__} that holds itself')
            return copy
        self.copies[id(value)] = None
        copy = self.copies[id(value)] = self._make(kind, value)
        return copy

    def _make(self, kind: type, value: Any) -> Any:
        if kind in (Tensor, nn.Parameter):
            # without hooks and attributes
            return value.detach()
        if kind in (list, tuple, set):
            return kind(map(self.copy, value))
        if kind in (dict, OrderedDict, Counter):
            copy: dict = kind()
            for key, item in dict.items(value):
                copy[self.copy(key)] = self.copy(item)
            # versions of modules, which a state dict carries
            if kind is OrderedDict and '_metadata' in vars(value):
                vars(copy)['_metadata'] = self.copy(vars(value)['_metadata'])
            return copy
        if kind is DtypeNote:
            return value.dtype
        if kind is ArrayNote:
            array = value.make()
            self.size -= array.nbytes
            if self.size < 0:
                raise _forbidden('numpy.ndarray of the same bytes, again and again')
            return array
        if kind is HistoryNote:
            return value.make(self.copy)
        if kind is ObjectNote:
            return dict(self.copy(value.state))
        if kind in self.trusted or (kind is FunctionType and value in ANNEALING):
            return value
        raise _forbidden(getattr(value, '__name__', kind.__name__))


def _reconstruct(kind: type, shape: tuple, code: bytes) -> ArrayNote:
    """Stands in for numpy's function of this name: an array without elements, yet."""
    if kind is not ArrayNote or shape != (0,) or code not in (b'b', 'b'):
        raise _forbidden('numpy._reconstruct of something else than an array')
    return ArrayNote()


def _scalar(dtype: DtypeNote, data: bytes) -> np.generic:
    """Stands in for numpy's function of this name."""
    if not isinstance(dtype, DtypeNote) or not isinstance(data, bytes):
        raise _forbidden('numpy.scalar without bytes and a dtype of numbers')
    (number,) = _numbers(dtype, data)
    return number


def _numbers(dtype: DtypeNote, data: bytes) -> np.ndarray:
    """Numbers of the machine's byte order, in memory of their own."""
    numbers = np.frombuffer(data, dtype.dtype)
    if numbers.dtype == bool:
        # other bytes than 0 and 1 are no bools
        return np.frombuffer(data, np.uint8) != 0
    return numbers.astype(numbers.dtype.newbyteorder('='))


def _no_bytes() -> bytes:
    """Stands in for `bytes` in a file: other than empty ones are written another way."""
    return b''


def _config(items: dict) -> dict:
    """Stands in for mmengine's `ConfigDict` in a file."""
    return dict(items)


def _method(owner: type, name: str) -> Callable | None:
    """Stands in for `getattr` in a file: two classes of mmengine write functions of theirs so."""
    if owner is HistoryNote and name in STATISTICS:
        return None
    for function in ANNEALING:
        if owner is OneCycleNote and name == function.__name__:
            return function
    raise _forbidden('getattr')


def _name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _forbidden(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f'GLOBAL {what}')
