"""Loads checkpoints as data: nothing in a file is run.

The whole project loads its checkpoints by `load_file`. torch reads the file with
`weights_only=True` and refuses all classes except a few. For further classes that training
checkpoints of mmengine hold, the stand-ins of `plain` take their place. Anything else is an error.
"""

from __future__ import annotations

import pickle
import re
import struct
import textwrap
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor

from .download import find_file, forget
from .errors import CheckpointError
from .plain import make_plain, stand_ins
from .safetensors import is_safetensors, read_safetensors
from .state_dict import extract_state_dict, find_state_dict, select

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
# The error of torch about a class or function that is not on its list, or of `plain` about
# arguments of a stand-in.
FORBIDDEN = re.compile(r'GLOBAL (.+?)( was not an allowed global| whose module|$)', re.MULTILINE)
STAND_INS = stand_ins()
# Held while the stand-ins are on torch's list, which all threads share.
LOCK = Lock()
# Errors of reading a file that is damaged, incomplete, or no checkpoint.
UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
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
        checkpoint = _read(file, map_location)
    except CheckpointError:
        raise
    except UNREADABLE as error:
        if forbidden := FORBIDDEN.search(str(error)):
            raise CheckpointError(
                f'{path} is refused: it holds {forbidden[1]}, which is neither a tensor nor plain '
                'data and could run code; if you trust it, save its state_dict alone to a new file'
            ) from error
        forget(str(path), file)
        # torch writes advice before the reason
        reason = str(error).rpartition('WeightsUnpickler error: ')[2]
        reason = textwrap.shorten(f'{type(error).__name__} {reason}', 120, placeholder=' ...')
        raise CheckpointError(
            f'{path} can not be read: it is truncated, damaged, or no file of torch.save; get it '
            f'again, or name another one (the reason: {reason})'
        ) from error
    if not isinstance(checkpoint, dict) or not _holds_tensors(checkpoint):
        raise CheckpointError(
            f'{path} is no checkpoint of a model: expected a dict of tensors, got '
            f'{type(checkpoint).__name__}{" without any" if isinstance(checkpoint, dict) else ""}'
        )
    return checkpoint


def use_safe_loading() -> None:
    """Make mmengine read every checkpoint through `load_file`, for as long as the process lives.

    That is what `Runner` loads and resumes, `init_detector`, `init_model`, inferencers, and
    `Pretrained` in the `init_cfg` of any model. A file that holds anything but tensors and plain
    data is a `CheckpointError`. Configs in a checkpoint are removed: an inferencer needs one of its
    own.

    Call it before anything is loaded. From then on, paths of pavi, S3 and Petrel are errors.
    """
    CheckpointLoader.register_scheme(SCHEMES, load_from_vetted, force=True)


def load_from_vetted(filename: str, map_location: str | torch.device | None = None) -> dict:
    """`load_file` as a loader of mmengine.

    The weights are under 'state_dict', where mmengine looks for them, and configs are removed.
    """
    checkpoint = load_file(filename, map_location)
    remove_configs(checkpoint)
    if filename.startswith('mmcls://'):
        # mmengine uses only the backbones of classifiers
        return {'state_dict': select(extract_state_dict(checkpoint), 'backbone.')}
    weights = find_state_dict(checkpoint)
    return checkpoint if weights is checkpoint else {**checkpoint, 'state_dict': weights}


def remove_configs(checkpoint: Mapping) -> None:
    """Remove the configs in a checkpoint: text that mmengine's runner and inferencers run."""
    hub = checkpoint.get('message_hub')
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    for place in (checkpoint.get('meta'), info):
        if isinstance(place, dict):
            place.pop('cfg', None)
            # the name that mmcv used
            place.pop('config', None)


def _read(file: Path, map_location: str | torch.device | None) -> Any:
    """The content of a file, as plain data."""
    # Files of a training are archives of torch.save, whatever `filename_tmpl` calls them.
    if is_safetensors(file) and not zipfile.is_zipfile(file):
        return read_safetensors(file, map_location)
    size = _unpacked_size(file)
    with LOCK:
        listed = torch.serialization.get_safe_globals()
        # Entries that the program has added under the same names would replace the stand-ins: take
        # them off the list, which the exit of this context does, and put them back afterwards.
        others = [entry for entry in listed if _name(entry) in STAND_INS]
        with torch.serialization.safe_globals(others):
            pass
        try:
            # The file is opened here, because torch would look at the suffix of a path.
            with (
                torch.serialization.safe_globals([(own, name) for name, own in STAND_INS.items()]),
                open(file, 'rb') as content,
            ):
                read = torch.load(content, map_location=map_location, weights_only=True)
        finally:
            torch.serialization.add_safe_globals(others)
    return make_plain(read, size, [entry for entry in listed if isinstance(entry, type)])


def _unpacked_size(file: Path) -> int:
    """Size of the content of a file in bytes; ValueError if it is far larger than the file.

    `torch.save` does not compress, so that this is a file that was made to fill the memory.
    """
    size = file.stat().st_size
    with open(file, 'rb') as content:
        if content.read(4) != b'PK\x03\x04':
            return size
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 10 * size + 2**26:
        raise ValueError(f'{size} bytes unpack to {unpacked}')
    return unpacked


def _name(entry: Callable | tuple[Callable, str]) -> str:
    """The name by which a file refers to an entry of torch's list."""
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'


def _holds_tensors(value: object) -> bool:
    """Whether nested dicts hold a tensor."""
    stack, seen = [value], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            return True
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values()
    return False
