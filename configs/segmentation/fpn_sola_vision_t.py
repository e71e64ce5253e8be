"""Semantic FPN, SoLA-Vision-T: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 128, 192, 288]),
)
