"""Reads what a checkpoint says about the data set that its model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError, printable


def read_dataset_meta(checkpoint: Mapping, file: str | Path) -> dict[str, Any] | None:
    """Names and colours of the classes, and further meta data of the data set.

    Args:
        checkpoint: From `load_file`.
        file: Its name, for the error.

    Returns:
        The meta data, under keys in lower case such as 'classes' and 'palette', or None if there is
        none. The names of classes are printable.

    Raises:
        CheckpointError: The names or colours are of a wrong type.
    """
    meta = checkpoint.get('meta')
    meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
    if meta is None:
        return None
    if not isinstance(meta, dict) or not all(isinstance(name, str) for name in meta):
        raise CheckpointError(f'{file}: meta.dataset_meta must be a dict with names')
    found = {name.lower(): value for name, value in meta.items()}
    classes, palette = found.get('classes', ()), found.get('palette', ())
    if isinstance(classes, str):
        classes = (classes,)
    if isinstance(palette, np.ndarray):
        palette = palette.tolist()
    if not (classes is None or _is_list_of(classes, lambda name: isinstance(name, str))):
        raise CheckpointError(f'{file}: classes in meta.dataset_meta must be names')
    # mmdet knows some palettes by name
    if not (palette is None or isinstance(palette, str) or _is_list_of(palette, _is_color)):
        raise CheckpointError(f'{file}: palette in meta.dataset_meta must be colours or a name')
    if classes:
        found['classes'] = tuple(map(printable, classes))
    return found


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(holds, value))


def _is_color(value: Any) -> bool:
    return _is_list_of(value, lambda part: isinstance(part, Real)) and len(value) == 3
