"""Linear-attention vision backbones for OpenMMLab.

Importing the package registers everything it ships.
"""

from . import backbones, datasets, engine, preprocessors

__version__ = '0.1.0'
__all__ = ['__version__', 'backbones', 'datasets', 'engine', 'preprocessors']
