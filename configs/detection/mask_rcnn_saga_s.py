"""Mask R-CNN, SAGA-S: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './mask_rcnn_saga_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2))
