"""Backbones by name, as in `create_backbone('saga_tiny')`."""

from __future__ import annotations

import difflib
import os
from typing import Any

from .pyramid import PyramidBackbone
from .ravlt import RAVLT
from .saga import SAGA
from .sola_vision import SoLAVision

FAMILIES: dict[str, Any] = {
    'saga': SAGA,
    'ravlt': RAVLT,
    'sola_vision': SoLAVision,
}
SIZES = {
    f'{family}_{arch}': (kind, arch)
    for family, kind in FAMILIES.items()
    for arch in kind.arch_settings
}


def list_backbones() -> list[str]:
    """The names that `create_backbone` knows."""
    return list(SIZES)


def create_backbone(
    name: str, checkpoint: str | os.PathLike | None = None, *, prefix: str = '', **options: Any
) -> PyramidBackbone:
    """A backbone, without a config.

    Args:
        name: Family and size, such as 'saga_tiny'; see `list_backbones`.
        checkpoint: File or URL of its weights. Defaults to None, for new weights.
        prefix: What stands before the names of the weights in the file, such as 'backbone.' in that
            of a detector. Defaults to ''.
        **options: Options of the backbone's class, such as `out_indices` and `drop_path_rate`.

    Returns:
        A module in training mode that maps images (B, 3, H, W) to a tuple of maps (B, C, H', W').

    Raises:
        ValueError: There is no backbone of that name, or an option has a wrong value.
        CheckpointError: The file can't be read, or none of its weights fits.
    """
    if name not in SIZES:
        near = difflib.get_close_matches(str(name), SIZES, 1)
        hint = f': did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'name must be one of {", ".join(SIZES)}, got {name!r}{hint}')
    kind, arch = SIZES[name]
    if checkpoint is not None:
        pretrained = dict(type='Pretrained', checkpoint=os.fspath(checkpoint))
        options['init_cfg'] = pretrained | (dict(prefix=prefix) if prefix else {})
    backbone = kind(arch, **options)
    if checkpoint is not None:
        backbone.init_weights()
    return backbone
