"""UperNet, RAVLT-S: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512."""

_base_ = './upernet_ravlt_t.py'

model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[64, 128, 320, 512]),
    auxiliary_head=dict(in_channels=320),
)
