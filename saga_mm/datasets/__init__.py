"""Data sets that saga_mm makes itself. Importing this registers them."""

from .scenes import scenes_det_dataset, scenes_seg_dataset

__all__ = ['scenes_det_dataset', 'scenes_seg_dataset']
