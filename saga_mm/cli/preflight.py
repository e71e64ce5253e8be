"""Looks for the data of a config before anything is built, to say what is missing.

Only what a data set would read itself is looked for: its class is asked for its suffixes, and a
class with its own way to find its files is left alone.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS, Registry

from .types import find_datasets, name_of, resolve

SPLITS = ('train', 'val', 'test')
# options of data sets that list the files of a folder by their suffix
SUFFIXES = {'img_path': 'img_suffix', 'seg_map_path': 'seg_map_suffix'}
# what the constructor of a data set may raise without its data
UNBUILDABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Entry(NamedTuple):
    """What a data set names under its root: a path, and the suffix of the files in it, or ''."""

    path: str
    suffix: str
    is_read: bool


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the files and folders which the data sets of a config read are there.

    Data sets that name none, as those that make their own data, are left alone.

    Args:
        cfg (Config): With `train_dataloader`, `val_dataloader`, `test_dataloader`, or some of them.
        splits (Sequence[str]): The ones to check, of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: Names what is missing or empty, the layout of the data set, and what to
            do. One line.
    """
    for split in splits:
        for key, dataset in _datasets(cfg, split):
            if missing := _missing(dataset, _entries(cfg, dataset)):
                raise FileNotFoundError(_advice(cfg, key, dataset, missing))


def _datasets(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """The data sets of a split, with their dotted names, if they are local."""
    loader = cfg.get(f'{split}_dataloader')
    if isinstance(loader, dict):
        for key, dataset in find_datasets(loader.get('dataset'), f'{split}_dataloader.dataset'):
            if not dataset.get('backend_args') and _is_local(dataset.get('data_root') or ''):
                yield key, dataset


def _is_local(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and '://' not in str(path)


def _entries(cfg: Config, dataset: dict) -> list[Entry]:
    """What a data set names; nothing if its class may look for something else."""
    scope = dataset.get('_scope_') or cfg.get('default_scope')
    kind = _resolve(dataset.get('type'), DATASETS, scope)
    # it reads nothing yet
    instance = _build(kind, dataset, lazy_init=True, pipeline=[])
    finds = ('full_init', 'load_data_list', *(('__init__',) if instance is None else ()))
    if kind and not all(_is_of_toolbox(_owner(kind, method)) for method in finds):
        return []
    suffixes = {}
    if kind and _owner(kind, 'load_data_list').__name__ == 'BaseSegDataset':
        suffixes = {key: _suffix(kind, instance, dataset, SUFFIXES[key]) for key in SUFFIXES}
    lists_images = bool(suffixes) and not dataset.get('ann_file')
    reads_images, reads_labels = _reads(dataset, scope)
    is_read = {
        **dict.fromkeys(('img', 'img_path'), reads_images or lists_images),
        **dict.fromkeys(('seg', 'seg_map_path'), reads_labels),
    }
    prefixes = dataset.get('data_prefix')
    entries = [
        Entry(path, suffixes.get(key, ''), is_read.get(key, False))
        for key, path in (prefixes.items() if isinstance(prefixes, dict) else ())
    ]
    entries.append(Entry(dataset.get('ann_file') or '', '', True))
    return [entry for entry in entries if _is_local(entry.path) and str(entry.path)]


def _resolve(kind: object, registry: Registry, scope: str | None) -> type | None:
    scopes = (scope,) if scope else ('mmseg', 'mmdet')
    return next(filter(None, (resolve(kind, registry, scope) for scope in scopes)), None)


def _build(kind: type | None, options: dict, **changes: object) -> object | None:
    """A data set or a transform, if it can be built."""
    options = {**options, **changes}
    for key in ('type', '_scope_'):
        options.pop(key, None)
    try:
        return kind(**options) if kind else None
    except UNBUILDABLE:
        # some look for their folders at once
        return None


def _owner(kind: type, method: str) -> type:
    """The class that defines a method of another."""
    return next((base for base in kind.__mro__ if method in vars(base)), object)


def _is_of_toolbox(kind: type) -> bool:
    return kind.__module__.partition('.')[0] in ('mmdet', 'mmengine', 'mmseg')


def _suffix(kind: type, instance: object | None, dataset: dict, option: str) -> str:
    """The suffix that a data set looks for."""
    if instance is not None:
        return getattr(instance, option)
    makers = (vars(base).get('__init__') for base in kind.__mro__)
    signatures = (inspect.signature(maker).parameters for maker in makers if maker)
    defaults = [signature[option].default for signature in signatures if option in signature]
    return dataset.get(option, defaults[0])


def _reads(dataset: dict, scope: str | None) -> tuple[bool, bool]:
    """Whether a data set reads images and label maps from files, as far as is known."""
    from mmcv.transforms import LoadAnnotations, LoadImageFromFile

    if 'pipeline' not in dataset:
        return True, True
    images = labels = False
    for transform in _transforms(dataset['pipeline']):
        kind = _resolve(transform.get('type'), TRANSFORMS, scope)
        if kind and issubclass(kind, LoadImageFromFile):
            images = True
        elif kind and issubclass(kind, LoadAnnotations):
            labels |= getattr(_build(kind, transform), 'with_seg', False)
    return images, labels


def _transforms(value: object) -> Iterator[dict]:
    """The transforms of a pipeline, also those that others hold."""
    if isinstance(value, dict):
        if 'type' in value:
            yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _transforms(item)


def _missing(dataset: dict, entries: Sequence[Entry]) -> str | None:
    """The outermost path that is read and not there, or a folder that is empty."""
    root = dataset.get('data_root') or ''
    read = [entry for entry in entries if entry.is_read]
    if root and any(not os.path.isabs(entry.path) for entry in read) and not Path(root).is_dir():
        return f'the folder {root} is missing'
    for entry in read:
        path = Path(root, entry.path)
        if not path.exists():
            return f'{path} is missing'
        if path.is_dir() and not any(os.scandir(path)):
            return f'the folder {path} is empty'
        if path.is_file() and path.stat().st_size == 0:
            return f'{path} is empty'
        if entry.suffix and path.is_dir() and not _holds(path, entry.suffix):
            return f'the folder {path} has no *{entry.suffix}'
    return None


def _holds(folder: Path, suffix: str) -> bool:
    """Whether mmengine would find a file, below links to folders as well."""
    files = list_dir_or_file(str(folder), list_dir=False, suffix=suffix, recursive=True)
    return next(iter(files), None) is not None


def _advice(cfg: Config, key: str, dataset: dict, missing: str) -> str:
    root = dataset.get('data_root') or ''
    layout: dict[str, str] = {}
    for _, other in (other for split in SPLITS for other in _datasets(cfg, split)):
        if (other.get('data_root') or '') == root:
            layout.update((entry.path, entry.suffix) for entry in _entries(cfg, other))
    files = ', '.join(
        f'{path.rstrip("/")}{f"/*{suffix}" if suffix else ""}' for path, suffix in layout.items()
    )
    where = f'{root} must hold {files}' if root else f'it takes {files}'
    option = f'--cfg-options {key}.data_root=FOLDER'
    if '{{$DATA_ROOT' in cfg.text:
        option = 'the environment variable DATA_ROOT'
    return (
        f'no data for {name_of(dataset.get("type"))}: {missing}. {where}: put the data set there, '
        f'or name its folder by {option}. The demo needs no data: python -m saga_mm demo'
    )
