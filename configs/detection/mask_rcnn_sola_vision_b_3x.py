"""Mask R-CNN, SoLA-Vision-B: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './mask_rcnn_saga_t_3x.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='base', drop_path_rate=0.4),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
