"""Mask R-CNN, SoLA-Vision-B: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './mask_rcnn_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='base', drop_path_rate=0.4),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
