"""Weights of a checkpoint, and how they fit a module.

There is one way from a checkpoint into a module: `extract_state_dict` finds the weights,
`match_weights` reports how they fit, and `load_matching` loads those that fit. The last two run the
same procedure, the `load_state_dict` of the module, so that the report is about what is loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model.weight_init import PretrainedInit, update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import CheckpointError, printable
from .loading import load_file
from .state_dict import (
    extract_state_dict,
    plain_name,
    plain_names,
    select,
    versions,
    with_versions,
)


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
        checkpoint (str | Path): As in `load_file`.
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
        weights = select(weights, prefix)
    match = match_weights(module, weights)
    if not match.loaded:
        raise CheckpointError(
            f'{checkpoint} has no weight that fits {type(module).__name__} under prefix={prefix!r} '
            f'({match}): the file starts with{_examples(names)}, the module with'
            f'{_examples(list(module.state_dict()))}; set prefix in init_cfg, or use another file'
        )
    load_matching(module, weights)
    print_log(f'{type(module).__name__} from {checkpoint}, weights: {match}', logger='current')
    return match


def load_model_weights(
    model: nn.Module, checkpoint: Mapping, file: str | Path, *, complete: bool, optional: str = ''
) -> LoadReport:
    """Load the weights of a checkpoint into the model of a config, if they are those of it.

    Args:
        model: A detector or segmentor, without wrappers.
        checkpoint: From `load_file` or from mmengine.
        file: Its name, for the error.
        complete: Each weight of the model must be there, with its shape. Else one is enough.
        optional: Weights whose names start with this may be missing. Defaults to none.

    Returns:
        How the weights fit.

    Raises:
        CheckpointError: They do not fit, and the model is as it was.
    """
    weights = extract_state_dict(checkpoint)
    match = match_weights(model, weights)
    missing = [name for name in match.missing if not (optional and name.startswith(optional))]
    if not match.loaded or (complete and (missing or match.mismatched)):
        raise CheckpointError(f'{file} does not fit the model of the config, weights: {match}')
    return load_matching(model, weights)


def match_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> LoadReport:
    """The report of `load_matching`, without changing the module."""
    with _NoCopies():
        return load_matching(module, weights)


def load_matching(module: nn.Module, weights: Mapping[str, Tensor]) -> LoadReport:
    """Load the weights that fit a module.

    Args:
        module: Its `load_state_dict` does the work. Many modules accept the names that their
            weights had in earlier versions.
        weights: From `extract_state_dict`; also under published names, see `translate`.

    Returns:
        How the weights fit. Counters of batch norms are not reported as missing.

    Raises:
        CheckpointError: A weight can't be copied.
    """
    own = {name: w for name, w in module.state_dict().items() if isinstance(w, Tensor)}
    in_module = {plain: name for name, plain in plain_names(own).items()}
    in_file = plain_names(weights)
    plain = translate(module, {in_file[name]: weight for name, weight in weights.items()})
    fitting = OrderedDict((in_module.get(name, name), weight) for name, weight in plain.items())
    mismatched = {
        name for name in own.keys() & fitting.keys() if not _fits(fitting[name], own[name])
    }
    for name in mismatched:
        del fitting[name]
    try:
        result = module.load_state_dict(with_versions(fitting, versions(weights)), strict=False)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'the weights can not be loaded: {reason}') from error
    # a batch norm keeps its counter where the file has none
    counters = {name for name in own.keys() - fitting if name.endswith('num_batches_tracked')}
    missing = set(result.missing_keys) & own.keys() - mismatched - counters
    loaded = own.keys() - mismatched - counters - missing
    return LoadReport(*map(sorted, (loaded, missing, result.unexpected_keys, mismatched)))


def translate(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with published names and shapes under those of a module; others are unchanged.

    A part of the module that knows published names has a method `translate_weights`, which takes
    and returns the weights below the part.
    """
    weights = dict(weights)
    for name, part in module.named_modules():
        if not hasattr(part, 'translate_weights'):
            continue
        prefix = f'{plain_name(name)}.' if plain_name(name) else ''
        own = [key for key in weights if key.startswith(prefix)]
        translated = part.translate_weights({key[len(prefix) :]: weights.pop(key) for key in own})
        weights |= {prefix + key: weight for key, weight in translated.items()}
    return weights


class ReportedPretrainedInit(PretrainedInit):
    """mmengine's `Pretrained` for `init_cfg`, through `load_weights`: with a report or an error."""

    def __call__(self, module: nn.Module) -> None:
        load_weights(module, self.checkpoint, self.prefix, self.map_location)
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())


def report_pretrained(init_cfg: dict | list | None) -> dict | list | None:
    """An `init_cfg` in which `Pretrained`, however it is named, is `ReportedPretrainedInit`."""
    if isinstance(init_cfg, list | tuple):
        # as in mmengine, weights from a file come after the other initialisers
        return sorted(map(report_pretrained, init_cfg), key=_is_reported)
    if not isinstance(init_cfg, dict):
        return init_cfg
    init_cfg = dict(init_cfg)
    kind = init_cfg.get('type')
    if isinstance(kind, str):
        kind = WEIGHT_INITIALIZERS.get(kind)
    if kind is PretrainedInit:
        init_cfg['type'] = ReportedPretrainedInit
    if 'override' in init_cfg:
        init_cfg['override'] = report_pretrained(init_cfg['override'])
    return init_cfg


class _NoCopies(TorchFunctionMode):
    """Context in which `Tensor.copy_`, by which modules load weights, does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        if func is Tensor.copy_:
            return args[0]
        return func(*args, **(kwargs or {}))


def _fits(weight: Tensor, own: Tensor) -> bool:
    """Whether a weight can be copied to one of a module."""
    return (
        weight.shape == own.shape
        and weight.layout == own.layout
        and weight.is_quantized == own.is_quantized
        and weight.is_complex() == own.is_complex()
        and (own.is_meta or not weight.is_meta)
    )


def _is_reported(init_cfg: object) -> bool:
    return isinstance(init_cfg, dict) and init_cfg.get('type') is ReportedPretrainedInit


def _examples(names: list[str], number: int = 3) -> str:
    if not names:
        return ''
    shown = ', '.join(map(printable, names[:number]))
    return f' ({shown}{", ..." if len(names) > number else ""})'
