"""SAGA without any gate: plain linear attention."""

_base_ = './saga.py'

model = dict(backbone=dict(gated=False, output_gate=False))
