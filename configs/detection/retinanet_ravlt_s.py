"""RetinaNet, RAVLT-S: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './retinanet_ravlt_t.py'

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[128, 320, 512]))
