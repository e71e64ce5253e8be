"""SAGA without gates on keys and values, with its output gate."""

_base_ = './saga.py'

model = dict(backbone=dict(gated=False))
