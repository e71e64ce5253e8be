"""Backbones, registered in `saga_mm.registry.MODELS`."""

from .ravlt import RAVLT
from .saga import SAGA

__all__ = ['RAVLT', 'SAGA']
