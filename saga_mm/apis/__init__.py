"""What the tools do, for use from Python: build models, load weights, predict, train and test."""

from .build import backbone_of, build_model, select_device
from .images import find_images, name_outputs
from .load import load_complete_weights, load_model
from .predict import make_detector, make_segmentor
from .runs import test, train

__all__ = [
    'backbone_of',
    'build_model',
    'find_images',
    'load_complete_weights',
    'load_model',
    'make_detector',
    'make_segmentor',
    'name_outputs',
    'select_device',
    'test',
    'train',
]
