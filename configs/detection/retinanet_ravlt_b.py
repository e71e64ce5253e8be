"""RetinaNet, RAVLT-B: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './retinanet_ravlt_t.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[192, 384, 512]))
