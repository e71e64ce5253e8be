"""Backbones, registered in `saga_mm.registry.MODELS`."""

from .saga import SAGA
from .sola_vision import SoLAVision

__all__ = ['SAGA', 'SoLAVision']
