"""Cascade Mask R-CNN, SAGA-T: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = [
    './_base_/models/cascade_mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/adamw_1x.py',
    './_base_/default_runtime.py',
]
