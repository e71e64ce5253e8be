"""Backbones, registered in `saga_mm.registry.MODELS`."""

from .ravlt import RAVLT
from .saga import SAGA
from .sola_vision import SoLAVision

__all__ = ['RAVLT', 'SAGA', 'SoLAVision']
