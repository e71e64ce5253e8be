"""UperNet on SAGA-T whose head has 128 channels in place of 512."""

_base_ = './upernet.py'

model = dict(decode_head=dict(channels=128), auxiliary_head=dict(channels=128))
