"""UperNet, RAVLT-L: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512."""

_base_ = './upernet_ravlt_t.py'

model = dict(
    backbone=dict(arch='large'),
    decode_head=dict(in_channels=[96, 192, 448, 640]),
    auxiliary_head=dict(in_channels=448),
)
