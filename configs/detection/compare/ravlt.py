"""RAVLT."""

_base_ = './saga.py'

model = dict(backbone=dict(type='saga_mm.RAVLT', arch=dict(mlp_ratios=(3.5, 3.5, 3.5, 3.5))))
