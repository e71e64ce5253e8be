"""Semantic FPN, RAVLT-S: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_ravlt_t.py'

model = dict(backbone=dict(arch='small'), neck=dict(in_channels=[64, 128, 320, 512]))
