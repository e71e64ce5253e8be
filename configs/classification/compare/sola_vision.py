"""SoLA-Vision."""

_base_ = './saga.py'

model = dict(
    backbone=dict(type='saga_mm.SoLAVision', arch=dict(mlp_ratios=(4, 4, 4, 4))),
)
