"""Looks for the data of a config before anything is built, to say what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.config import Config

SPLITS = ('train', 'val', 'test')
SUFFIXES = {'img_path': ('img_suffix', '.jpg'), 'seg_map_path': ('seg_map_suffix', '.png')}


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the files and folders which the data sets of a config name are there.

    Data sets that name none, as those that make their own data, are left alone.

    Args:
        cfg (Config): With `train_dataloader`, `val_dataloader`, `test_dataloader`, or some of them.
        splits (Sequence[str]): The ones to check, of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: Names what is missing or empty, the layout of the data set, and what to
            do. One line.
    """
    for split in splits:
        for dataset in _datasets(cfg, split):
            if missing := _missing(dataset):
                raise FileNotFoundError(_advice(cfg, split, dataset, missing))


def _datasets(cfg: Config, split: str) -> Iterator[dict]:
    """The data sets of a split, out of their wrappers, if they are local."""
    loader = cfg.get(f'{split}_dataloader') or {}
    stack = [loader.get('dataset')]
    while stack:
        dataset = stack.pop()
        if isinstance(dataset, (list, tuple)):
            stack += dataset
        elif isinstance(dataset, dict):
            stack += [dataset.get('dataset'), dataset.get('datasets')]
            if not dataset.get('backend_args'):
                yield dataset


def _entries(dataset: dict) -> list[tuple[str, str]]:
    """Paths under its root that a data set names, with the suffix of the files in it or ''."""
    entries = []
    for key, path in (dataset.get('data_prefix') or {}).items():
        option, default = SUFFIXES.get(key, ('', ''))
        entries.append((path, dataset.get(option, default)))
    entries.append((dataset.get('ann_file'), ''))
    return [entry for entry in entries if isinstance(entry[0], str) and entry[0]]


def _missing(dataset: dict) -> str | None:
    """The outermost path that is not there, or a folder that is empty."""
    root = dataset.get('data_root') or ''
    entries = _entries(dataset)
    if root and entries and not Path(root).is_dir():
        return f'the folder {root} is missing'
    for name, suffix in entries:
        path = Path(root, name)
        if not path.exists():
            return f'{path} is missing'
        if path.is_dir() and not any(os.scandir(path)):
            return f'the folder {path} is empty'
        if path.is_file() and path.stat().st_size == 0:
            return f'{path} is empty'
        if suffix and path.is_dir() and not any(path.rglob(f'*{suffix}')):
            return f'the folder {path} has no *{suffix}'
    return None


def _advice(cfg: Config, split: str, dataset: dict, missing: str) -> str:
    root = dataset.get('data_root') or ''
    layout: dict[str, str] = {}
    for other in (other for name in SPLITS for other in _datasets(cfg, name)):
        if (other.get('data_root') or '') == root:
            layout.update(_entries(other))
    files = ', '.join(
        f'{path.rstrip("/")}{f"/*{suffix}" if suffix else ""}' for path, suffix in layout.items()
    )
    where = f'{root} must hold {files}' if root else f'it takes {files}'
    option = f'--cfg-options {split}_dataloader.dataset.data_root=FOLDER'
    if '{{$DATA_ROOT' in cfg.text:
        option = 'the environment variable DATA_ROOT'
    return (
        f'no data for {dataset.get("type")}: {missing}. {where}: put the data set there, or name '
        f'its folder by {option}. The demo needs no data: make demo'
    )
