"""UperNet on SAGA-T with heads of 128 channels and plain BN, for a single process."""

_base_ = './upernet_small.py'

model = dict(decode_head=dict(channels=128), auxiliary_head=dict(channels=128))
