"""Loads checkpoints, for the whole project: a file is data, and nothing in it runs.

torch reads a checkpoint without executing it when it is told so (`weights_only`), and refuses all
classes but a few. Training checkpoints of mmengine hold some more, which are named here. Anything
else is an error, without a fallback.
"""

from __future__ import annotations

import pickle
import re
import struct
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .download import find_file
from .errors import CheckpointError

SCHEMES = (
    '',
    'http://',
    'https://',
    'torchvision://',
    'modelzoo://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
    'pavi://',
    r'(\S+\:)?s3://',
    r'(\S+\:)?petrel://',
)
# what torch raises on bytes that are not a checkpoint, or not all of one
UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_file(path: str | Path, map_location: str | torch.device | None = 'cpu') -> dict:
    """Read a checkpoint, without running anything in it.

    Args:
        path (str | Path): A file, an http(s) URL, which is kept in torch's cache, or a name such as
            'torchvision://resnet50', which mmengine knows the URL of.
        map_location (str | torch.device, optional): Where the tensors go, as in `torch.load`.
            Defaults to 'cpu'.

    Returns:
        dict: What was saved.

    Raises:
        CheckpointError: There is no such file, it is damaged, it is no checkpoint, or it holds
            anything that is neither a tensor nor plain data.
    """
    file = find_file(str(path))
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except UNREADABLE as error:
        if forbidden := re.search(r'GLOBAL (\S+)', str(error)):
            raise CheckpointError(
                f'{path} is refused: it holds {forbidden[1]}, which is neither a tensor nor plain '
                'data and could run code; if you trust it, save its state_dict alone to a new file'
            ) from error
        # torch puts its advice first
        reason = str(error).rpartition('WeightsUnpickler error: ')[2]
        reason = textwrap.shorten(f'{type(error).__name__} {reason}', 120, placeholder=' ...')
        raise CheckpointError(
            f'{path} can not be read: it is truncated, damaged, or no file of torch.save; get it '
            f'again, or name another one (torch says: {reason})'
        ) from error
    if not isinstance(checkpoint, dict) or not _holds_tensors(checkpoint):
        raise CheckpointError(
            f'{path} is no checkpoint of a model: expected a dict of tensors, got '
            f'{type(checkpoint).__name__}{" without any" if isinstance(checkpoint, dict) else ""}'
        )
    return checkpoint


def use_safe_loading() -> None:
    """Make mmengine read every checkpoint through `load_file`.

    That is `load_from`, resume, and `init_cfg` of whatever model; for as long as the process lives.
    """
    CheckpointLoader.register_scheme(SCHEMES, load_from_vetted, force=True)


def load_from_vetted(filename: str, map_location: str | torch.device | None = None) -> dict:
    """`load_file` as a loader of mmengine, without an entry that mmengine would execute."""
    checkpoint = load_file(filename, map_location)
    if isinstance(checkpoint.get('meta'), dict):
        # Runner.resume runs this text as a Python config
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor)


def _safe_globals() -> list:
    """Classes and functions that training checkpoints of mmengine need besides torch's own list.

    Numbers logged by mmengine are in `HistoryBuffer`s, in numpy arrays.
    """
    numpy = np.__dict__.get('_core', None) or np.core
    multiarray = numpy.multiarray
    # numpy 1 and 2 write different module names, and read both
    functions = [
        (getattr(multiarray, name), f'numpy.{core}.multiarray.{name}')
        for name in ('_reconstruct', 'scalar')
        for core in ('core', '_core')
    ]
    dtypes = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + '?efdgFDG'}
    functions += [(_number_dtype, 'numpy.dtype'), (_history_method, 'builtins.getattr')]
    return [HistoryBuffer, np.ndarray, *functions, *dtypes]


def _number_dtype(code: str, *_: object) -> np.dtype:
    """Stands in for `numpy.dtype` in a file: numbers only, and no copy.

    A copy would take its flags from the file: an 'object' type without them makes numpy read
    pointers out of the file. The built-in types that this returns ignore such flags.
    """
    if not isinstance(code, str) or np.dtype(code).kind not in 'biufc':
        raise pickle.UnpicklingError(f'GLOBAL numpy.dtype({code!r})')
    return np.dtype(code)


def _history_method(owner: type, name: str) -> Callable:
    """Stands in for `getattr` in a file: `HistoryBuffer` writes its methods so."""
    if owner is not HistoryBuffer or name not in ('current', 'max', 'mean', 'min'):
        raise pickle.UnpicklingError('GLOBAL getattr')
    return getattr(owner, name)
