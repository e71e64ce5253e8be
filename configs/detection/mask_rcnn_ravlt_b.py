"""Mask R-CNN, RAVLT-B: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './mask_rcnn_ravlt_t.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[96, 192, 384, 512]))
