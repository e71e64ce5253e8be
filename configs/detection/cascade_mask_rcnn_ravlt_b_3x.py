"""Cascade Mask R-CNN, RAVLT-B: batch 2 x 8 GPUs, 3x (36 epochs) at multiple scales, COCO."""

_base_ = './cascade_mask_rcnn_ravlt_t_3x.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[96, 192, 384, 512]))
