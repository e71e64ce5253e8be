"""What a checkpoint may hold: tensors and plain data.

With `weights_only=True`, torch calls nothing that a file names, except classes and functions on a
list, which get arguments from the file. Training checkpoints of mmengine need numpy arrays and
`HistoryBuffer`s. Their own classes can't be on the list, because they trust their arguments: a file
can make numpy follow a pointer. The list therefore holds the stand-ins of this module, which check
or record their arguments and call nothing. `make_plain` replaces the records by the objects that
they stand for, and refuses objects of any other type.
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

# Types of values, besides containers.
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
# Functions that the state of a scheduler may refer to.
ANNEALING = (OneCycleParamScheduler._annealing_cos, OneCycleParamScheduler._annealing_linear)
STATISTICS = ('current', 'max', 'mean', 'min')


class DtypeRecord:
    """Stands in for `numpy.dtype` in a file: numbers only, in either byte order."""

    __slots__ = ('dtype',)

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not re.fullmatch(r'[biufc]\d{1,2}', code):
            raise _forbidden(f'numpy.dtype({code!r})')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        # The state is (version, byte order, subarray, names, fields, size, alignment, flags). What
        # follows the byte order describes structures and objects, and is ignored.
        order = state[1]
        if order not in ('<', '>', '=', '|'):
            raise _forbidden(f'numpy.dtype in the byte order {order!r}')
        self.dtype = self.dtype.newbyteorder(order)


class ArrayRecord:
    """Stands in for `numpy.ndarray` in a file, and records the state of the array."""

    __slots__ = ('state',)

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def make(self) -> np.ndarray:
        """A new array of numbers; it shares no memory with the file."""
        *_, shape, dtype, is_fortran, data = self.state
        if not isinstance(dtype, DtypeRecord) or not isinstance(data, bytes):
            raise _forbidden('numpy.ndarray without bytes and a dtype of numbers')
        return _numbers(dtype, data).reshape(shape, order='F' if is_fortran else 'C')


class ObjectRecord:
    """Stands in for a class in a file, and records the attributes of the object."""

    __slots__ = ('state',)

    def __setstate__(self, state: dict) -> None:
        self.state = state


class HistoryRecord(ObjectRecord):
    """Stands in for `HistoryBuffer` in a file."""

    __slots__ = ()

    def make(self, copy: Callable[[Any], Any]) -> HistoryBuffer:
        """A new buffer with these numbers. The statistics methods of the file are ignored."""
        logs, counts = (copy(self.state[name]) for name in ('_log_history', '_count_history'))
        length = self.state['max_length']
        if not all(
            isinstance(series, np.ndarray) and series.ndim == 1 for series in (logs, counts)
        ):
            raise _forbidden('HistoryBuffer without two series of numbers')
        if len(logs) != len(counts) or type(length) is not int or length < len(logs):
            raise _forbidden(f'HistoryBuffer with other lengths than its max_length={length!r}')
        return HistoryBuffer(logs, counts, max_length=length)


class OneCycleRecord:
    """Stands in for the class `OneCycleParamScheduler`, whose state refers to its functions."""

    __slots__ = ()


def stand_ins() -> dict[str, Callable]:
    """The stand-ins by the name that a file calls. numpy 1 and 2 write different names."""
    known: dict[str, Callable] = {
        'argparse.Namespace': ObjectRecord,
        'builtins.bytes': _no_bytes,
        'builtins.getattr': _method,
        'numpy.dtype': DtypeRecord,
        'numpy.ndarray': ArrayRecord,
        _name(ConfigDict): _config,
        _name(HistoryBuffer): HistoryRecord,
        _name(OneCycleParamScheduler): OneCycleRecord,
    }
    for core in ('core', '_core'):
        known[f'numpy.{core}.multiarray._reconstruct'] = _reconstruct
        known[f'numpy.{core}.multiarray.scalar'] = _scalar
    return known


def make_plain(value: Any, size: int, trusted: Collection[type] = ()) -> Any:
    """Copy what torch read from a file, with the objects in place of their records.

    Args:
        value: What torch read. Tensors are not copied, but lose their hooks and attributes.
        size: Size of the file in bytes. Arrays with more bytes in total are refused: a short file
            can make many arrays of the same bytes.
        trusted: Further classes whose objects are kept as they are.

    Raises:
        pickle.UnpicklingError: An object is neither a tensor nor plain data, or a container holds
            itself.
        RecursionError: Containers are nested too deeply.
    """
    return _Copy(size, trusted).copy(value)


class _Copy:
    def __init__(self, size: int, trusted: Collection[type]) -> None:
        self.size = size
        self.trusted = trusted
        # copies by the id of the original, so that shared objects stay shared; None while a
        # container is being copied
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
            return value.detach()
        if kind in (list, tuple, set):
            return kind(map(self.copy, value))
        if kind in (dict, OrderedDict, Counter):
            copy: dict = kind()
            for key, item in dict.items(value):
                copy[self.copy(key)] = self.copy(item)
            # a state dict carries the versions of its modules
            if kind is OrderedDict and '_metadata' in vars(value):
                vars(copy)['_metadata'] = self.copy(vars(value)['_metadata'])
            return copy
        if kind is DtypeRecord:
            return value.dtype
        if kind is ArrayRecord:
            array = value.make()
            self.size -= array.nbytes
            if self.size < 0:
                raise _forbidden('numpy.ndarray many times over the same bytes')
            return array
        if kind is HistoryRecord:
            return value.make(self.copy)
        if kind is ObjectRecord:
            return dict(self.copy(value.state))
        if kind in self.trusted or (kind is FunctionType and value in ANNEALING):
            return value
        raise _forbidden(getattr(value, '__name__', kind.__name__))


def _reconstruct(kind: type, shape: tuple, code: bytes) -> ArrayRecord:
    """Stands in for numpy's function of this name, which makes an array without elements."""
    if kind is not ArrayRecord or shape != (0,) or code not in (b'b', 'b'):
        raise _forbidden('numpy._reconstruct of something else than an array')
    return ArrayRecord()


def _scalar(dtype: DtypeRecord, data: bytes) -> np.generic:
    """Stands in for numpy's function of this name."""
    if not isinstance(dtype, DtypeRecord) or not isinstance(data, bytes):
        raise _forbidden('numpy.scalar without bytes and a dtype of numbers')
    (number,) = _numbers(dtype, data)
    return number


def _numbers(dtype: DtypeRecord, data: bytes) -> np.ndarray:
    """A new array of the numbers in some bytes, in the byte order of the machine."""
    numbers = np.frombuffer(data, dtype.dtype)
    if numbers.dtype == bool:
        # bytes other than 0 and 1 are not valid as bool
        return np.frombuffer(data, np.uint8) != 0
    return numbers.astype(numbers.dtype.newbyteorder('='))


def _no_bytes() -> bytes:
    """Stands in for `bytes`, which a file calls only for empty bytes."""
    return b''


def _config(items: dict) -> dict:
    """Stands in for mmengine's `ConfigDict` in a file."""
    return dict(items)


def _method(owner: type, name: str) -> Callable | None:
    """Stands in for `getattr`, by which two classes of mmengine refer to their functions."""
    if owner is HistoryRecord and name in STATISTICS:
        return None
    for function in ANNEALING:
        if owner is OneCycleRecord and name == function.__name__:
            return function
    raise _forbidden('getattr')


def _name(kind: type) -> str:
    return f'{kind.__module__}.{kind.__qualname__}'


def _forbidden(what: str) -> pickle.UnpicklingError:
    return pickle.UnpicklingError(f'GLOBAL {what}')
