"""Cascade Mask R-CNN, RAVLT-T: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = [
    './_base_/models/cascade_mask_rcnn_4conv1fc.py',
    './_base_/datasets/coco_instance_multiscale.py',
    './_base_/schedules/adamw_3x.py',
    './_base_/default_runtime.py',
]

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
