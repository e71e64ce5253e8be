"""Semantic FPN, RAVLT-L: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_ravlt_t.py'

model = dict(backbone=dict(arch='large'), neck=dict(in_channels=[96, 192, 448, 640]))
