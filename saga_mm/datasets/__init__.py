"""Data sets that saga_mm generates. Importing this package registers them."""

from .scenes import scenes_cls_dataset, scenes_det_dataset, scenes_seg_dataset

__all__ = ['scenes_cls_dataset', 'scenes_det_dataset', 'scenes_seg_dataset']
