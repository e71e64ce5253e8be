"""UperNet, SoLA-Vision-T: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512."""

_base_ = './upernet_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='tiny', drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 128, 192, 288]),
    auxiliary_head=dict(in_channels=192),
)
