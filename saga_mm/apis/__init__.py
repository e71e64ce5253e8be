"""What the tools do, for use from Python: build models, load weights, predict, train and test."""

from .build import backbone_of, build_model, select_device
from .class_maps import class_map_path
from .images import find_images, name_outputs, write_image
from .load import load_complete_weights, load_model
from .pipeline import ImagePipeline, to_8_bit
from .predict import Prediction, Predictor, toolbox_of
from .predictions import CocoFile, PredictionFiles, write_label_map
from .runs import test, train
from .whole import WholePredictor, segment_whole

__all__ = [
    'CocoFile',
    'ImagePipeline',
    'Prediction',
    'PredictionFiles',
    'Predictor',
    'WholePredictor',
    'backbone_of',
    'build_model',
    'class_map_path',
    'find_images',
    'load_complete_weights',
    'load_model',
    'name_outputs',
    'segment_whole',
    'select_device',
    'test',
    'to_8_bit',
    'toolbox_of',
    'train',
    'write_image',
    'write_label_map',
]
