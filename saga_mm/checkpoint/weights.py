"""Weights of a checkpoint, and how they fit a module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .errors import CheckpointError
from .loading import load_file


class LoadReport(NamedTuple):
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


def load_weights(
    module: nn.Module,
    checkpoint: str | Path,
    prefix: str | None = None,
    map_location: str | torch.device | None = 'cpu',
) -> LoadReport:
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
        LoadReport: Names of the weights: loaded, missing, unexpected, and those of another shape.

    Raises:
        CheckpointError: The file can't be read, or none of its weights fits.
    """
    weights = extract_state_dict(load_file(checkpoint, map_location))
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


def extract_state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
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


def match_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> LoadReport:
    """Compare weights with those of a module; counters of batch norms may be missing."""
    own = {name: w for name, w in module.state_dict().items() if isinstance(w, Tensor)}
    common = own.keys() & weights.keys()
    loaded = {name for name in common if own[name].shape == weights[name].shape}
    missing = {name for name in own.keys() - common if not name.endswith('num_batches_tracked')}
    unexpected = weights.keys() - common
    return LoadReport(*map(sorted, (loaded, missing, unexpected, common - loaded)))


def _examples(names: list[str], number: int = 3) -> str:
    if not names:
        return ''
    return f' ({", ".join(names[:number])}{", ..." if len(names) > number else ""})'
