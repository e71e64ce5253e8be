"""Builds the model of a config, and selects the device that it computes on."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..backbones.pyramid import PyramidBackbone
from ..cli.types import resolve


def select_device(name: str | None = None) -> torch.device:
    """The device called `name`, or by default a GPU if there is one and else the CPU.

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
    """The model of a config, for one process and in eval mode; no weights are loaded."""
    init_default_scope(cfg.get('default_scope') or _scope_of(cfg))
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


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


def _scope_of(cfg: Config) -> str:
    """The scope where the model looks for its parts, if the config names none."""
    kind = resolve(cfg.model.get('type'), MODELS, cfg)
    packages = [part.__module__.partition('.')[0] for part in kind.__mro__] if kind else []
    return next((name for name in packages if name in ('mmdet', 'mmseg')), 'mmengine')
