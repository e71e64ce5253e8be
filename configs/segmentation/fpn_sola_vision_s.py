"""Semantic FPN, SoLA-Vision-S: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='small', drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
