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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_external_models, get_torchvision_models
from torch import Tensor, nn

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


class CheckpointError(ValueError):
    """A checkpoint can't be used. The message is one line that names the file."""


class Match(NamedTuple):
    """How the weights of a file fit a module: names, sorted."""

    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]

    def __str__(self) -> str:
        return ', '.join(
            f'{len(names)} {kind}{_examples(names) if kind != "loaded" else ""}'
            for kind, names in self._asdict().items()
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
    file = _find(str(path))
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


def load_backbone_weights(
    module: nn.Module,
    checkpoint: str | Path,
    prefix: str | None = None,
    map_location: str | torch.device | None = 'cpu',
) -> Match:
    """Load pretrained weights into a module and log how many fit.

    Args:
        module (nn.Module): Takes the weights that have its names and shapes, or those of a
            publication that it knows (see `translate`).
        checkpoint (str | Path): As in `load_file`. Weights may lie under 'state_dict' or 'model',
            and their names may start with 'module.'.
        prefix (str, optional): Take the weights whose names start with this, without it, such as
            'backbone.' for the checkpoint of a detector. Defaults to None.
        map_location (str | torch.device, optional): As in `load_file`. Defaults to 'cpu'.

    Returns:
        Match: Names of the weights: loaded, missing, unexpected, and those of another shape.

    Raises:
        CheckpointError: The file can't be read, or none of its weights fits.
    """
    weights = state_dict(load_file(checkpoint, map_location))
    names = list(weights)
    if prefix is not None:
        prefix = prefix.rstrip('.') + '.'
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
    weights = translate(module, weights)
    match = match_weights(module, weights)
    if not match.loaded:
        raise CheckpointError(
            f'{checkpoint} has no weight that fits {type(module).__name__} under prefix={prefix!r} '
            f'({match}): the file starts with{_examples(names)}, the module with'
            f'{_examples(list(module.state_dict()))}; set prefix in init_cfg, or use another file'
        )
    module.load_state_dict({name: weights[name] for name in match.loaded}, strict=False)
    print_log(f'{type(module).__name__} from {checkpoint}, weights: {match}', logger='current')
    return match


def state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
    """The weights in a checkpoint, without the 'module.' of a model wrapper."""
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {
        str(name).removeprefix('module.'): weight
        for name, weight in checkpoint.items()
        if isinstance(weight, Tensor)
    }


def translate(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with published names and shapes as the parts of a module have them, others as is.

    A part that knows such names has a method `translate_weights(weights) -> weights`.
    """
    weights = dict(weights)
    for name, part in module.named_modules():
        if not hasattr(part, 'translate_weights'):
            continue
        prefix = f'{name}.' if name else ''
        own = [key for key in weights if key.startswith(prefix)]
        translated = part.translate_weights({key[len(prefix) :]: weights.pop(key) for key in own})
        weights |= {prefix + key: weight for key, weight in translated.items()}
    return weights


def missing_for_resume(checkpoint: Mapping) -> list[str]:
    """What a training can't go on without, and this checkpoint doesn't hold."""
    return sorted({'meta', 'message_hub', 'optimizer'} - checkpoint.keys())


def match_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Match:
    """Compare weights with those of a module; counters of batch norms may be missing."""
    own = {name: w for name, w in module.state_dict().items() if isinstance(w, Tensor)}
    common = own.keys() & weights.keys()
    loaded = {name for name in common if own[name].shape == weights[name].shape}
    missing = {name for name in own.keys() - common if not name.endswith('num_batches_tracked')}
    unexpected = weights.keys() - common
    return Match(*map(sorted, (loaded, missing, unexpected, common - loaded)))


def _holds_tensors(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, Tensor)


def _examples(names: list[str], number: int = 3) -> str:
    if not names:
        return ''
    return f' ({", ".join(names[:number])}{", ..." if len(names) > number else ""})'


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


def _find(path: str) -> Path:
    """The file behind a path, a URL or a name in mmengine's tables."""
    scheme, separator, name = path.partition('://')
    if scheme in ('torchvision', 'modelzoo') and separator:
        path = _look_up(path, name, get_torchvision_models())
    elif scheme in ('open-mmlab', 'openmmlab') and separator:
        path = _look_up(path, name, get_external_models())
    if path.startswith(('http://', 'https://')):
        return _download(path)
    if '://' in path:
        raise CheckpointError(f'{path} can not be loaded: download it, and name the file')
    file = Path(path).expanduser()
    if file.is_dir():
        raise CheckpointError(f'{path} is a folder: name a checkpoint in it')
    if not file.is_file():
        raise CheckpointError(f'{path} does not exist: check the path of the checkpoint')
    return file


def _look_up(path: str, name: str, urls: Mapping[str, str]) -> str:
    if name not in urls:
        raise CheckpointError(f'{path} is unknown to mmengine: name a file or a URL')
    return urls[name]


def _download(url: str) -> Path:
    """The file of a URL in torch's cache; one process per machine fetches it, if need be."""
    file = Path(torch.hub.get_dir()) / 'checkpoints' / Path(urlparse(url).path).name
    if is_main_process():
        _fetch(url, file)
    barrier()
    # on the other machines of a cluster
    _fetch(url, file)
    return file


def _fetch(url: str, file: Path) -> None:
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    # published files end in the start of their hash, as in resnet50-0676ba61.pth
    digest = re.search(r'-([a-f0-9]{8,})\.', file.name)
    try:
        torch.hub.download_url_to_file(url, str(file), digest and digest[1], progress=True)
    # a wrong hash is a RuntimeError
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f'{url} can not be downloaded: {error}') from error
