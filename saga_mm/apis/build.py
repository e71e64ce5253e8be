"""Builds the model of a config, and selects the device that it computes on."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..backbones.pyramid import PyramidBackbone
from ..cli.suggest import suggest_type
from ..cli.types import resolve


def select_device(name: str | None = None) -> torch.device:
    """The device called `name`. The default is a GPU if there is one, else the CPU.

    Raises:
        ValueError: torch can't compute on that device.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        torch.zeros(1, device=name).cpu()
    # a torch built without CUDA raises AssertionError
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'device {name!r} is not available: {reason}') from error
    return torch.device(name)


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a config, for one process and in eval mode, without loading weights.

    Raises:
        ValueError: There is no model of the type that the config names.
    """
    kind = resolve(cfg.model.get('type'), MODELS, cfg.get('default_scope'))
    if kind is None:
        _import_models(cfg)
        with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
            near = suggest_type(str(cfg.model.get('type')), registry)
        raise ValueError(
            f'model.type must be a registered model, got {cfg.model.get("type")!r}, default_scope '
            f'{cfg.get("default_scope")!r}: name the module that registers it in custom_imports'
            f'{near}'
        )
    init_default_scope(cfg.get('default_scope') or _scope_of(kind))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    # `eval` of some models of mmdet returns nothing
    model.eval()
    return model


def backbone_of(model: nn.Module, config: str) -> PyramidBackbone:
    """The backbone of the model of a config.

    Args:
        model: A detector or segmentor.
        config: The name of its config, for the error.

    Raises:
        ValueError: The backbone is not one of saga_mm.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, PyramidBackbone):
        raise ValueError(
            f'{config}: the backbone of the config must be one of saga_mm, got '
            f'{type(backbone).__name__}'
        )
    return backbone


def _import_models(cfg: Config) -> None:
    """Import the models of a config's toolbox, whose errors the registry keeps to itself."""
    prefix, dot, _ = str(cfg.model.get('type')).partition('.')
    scope = prefix if dot else cfg.get('default_scope')
    if scope in ('mmdet', 'mmpretrain', 'mmseg') and find_spec(scope):
        import_module(f'{scope}.models')


def _scope_of(kind: type) -> str:
    """The registry scope of the toolbox of a model, for a config without a default scope."""
    packages = [part.__module__.partition('.')[0] for part in kind.__mro__]
    return next((name for name in packages if name in ('mmdet', 'mmseg')), 'mmengine')
