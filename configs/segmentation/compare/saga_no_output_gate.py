"""SAGA with gates on keys and values only."""

_base_ = './saga.py'

model = dict(backbone=dict(output_gate=False))
