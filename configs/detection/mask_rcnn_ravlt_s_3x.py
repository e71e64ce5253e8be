"""Mask R-CNN, RAVLT-S: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './mask_rcnn_saga_t_3x.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='small', norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
