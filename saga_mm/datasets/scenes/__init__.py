"""Scenes of textured objects over photographs: a data set made from a seed, without a download.

The modules, from the lowest level to the highest: `photos` (the photographs of scikit-image),
`shapes` and `surfaces` (one object), `kinds` (the appearance of a class), `render` (one scene),
`layouts` (file names and categories: scenes, COCO, ADE20K), `polygons` (a mask as COCO polygons),
`writing` (a whole folder, complete or absent), `datasets` (the data sets that configs name).
"""

from .datasets import scenes_cls_dataset, scenes_det_dataset, scenes_seg_dataset
from .layouts import CLASSES, LAYOUTS, PALETTE
from .writing import make_scenes

__all__ = [
    'CLASSES',
    'LAYOUTS',
    'PALETTE',
    'make_scenes',
    'scenes_cls_dataset',
    'scenes_det_dataset',
    'scenes_seg_dataset',
]
