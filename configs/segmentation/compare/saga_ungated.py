"""SAGA without gates."""

_base_ = './saga.py'

model = dict(backbone=dict(gated=False))
