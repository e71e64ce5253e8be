"""Semantic FPN, RAVLT-B: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_ravlt_t.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[96, 192, 384, 512]))
