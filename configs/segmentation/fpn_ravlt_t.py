"""Semantic FPN, RAVLT-T: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = './fpn_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
