"""Scenes of textured objects over photographs: a data set made from a seed, without a download.

From the inside out: `photos` (what scikit-image ships), `shapes` and `surfaces` (one object),
`kinds` (what a class looks like), `render` (one scene), `layouts` (file names and categories:
scenes, COCO, ADE20K), `polygons` (a mask as COCO polygons), `writing` (a whole folder, complete or
absent), `datasets` (what a config names).
"""

from .datasets import scenes_det_dataset, scenes_seg_dataset
from .layouts import CLASSES, LAYOUTS, PALETTE
from .writing import make_scenes

__all__ = [
    'CLASSES',
    'LAYOUTS',
    'PALETTE',
    'make_scenes',
    'scenes_det_dataset',
    'scenes_seg_dataset',
]
