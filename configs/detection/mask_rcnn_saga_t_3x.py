"""Mask R-CNN, SAGA-T: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance_multiscale.py',
    './_base_/schedules/adamw_3x.py',
    './_base_/default_runtime.py',
]
