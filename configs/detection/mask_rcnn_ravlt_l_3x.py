"""Mask R-CNN, RAVLT-L: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './mask_rcnn_saga_t_3x.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='large', norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
