"""Linear-attention vision backbones for OpenMMLab.

Importing the package registers everything it ships. `use_safe_loading` makes mmengine read
checkpoints without running anything in them.
"""

from . import backbones, datasets, engine, preprocessors
from .checkpoint import use_safe_loading

__version__ = '0.1.0'
__all__ = [
    '__version__',
    'backbones',
    'datasets',
    'engine',
    'preprocessors',
    'use_safe_loading',
]
