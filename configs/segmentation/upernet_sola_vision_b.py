"""UperNet, SoLA-Vision-B: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512."""

_base_ = './upernet_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='base', drop_path_rate=0.4),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
