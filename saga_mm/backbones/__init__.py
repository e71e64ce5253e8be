"""Backbones, registered in `saga_mm.registry.MODELS`."""

from .saga import SAGA

__all__ = ['SAGA']
