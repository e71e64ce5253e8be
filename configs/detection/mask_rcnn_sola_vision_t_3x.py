"""Mask R-CNN, SoLA-Vision-T: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './mask_rcnn_saga_t_3x.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 128, 192, 288]),
)
