"""Mask R-CNN, SoLA-Vision-S: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './mask_rcnn_saga_t_3x.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
