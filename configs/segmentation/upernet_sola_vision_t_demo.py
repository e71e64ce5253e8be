"""UperNet, SoLA-Vision-T, from scratch on the embedded scenes, like `upernet_saga_t_demo.py`."""

_base_ = './upernet_saga_t_demo.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='tiny', drop_path_rate=0.0),
    decode_head=dict(in_channels=[96, 128, 192, 288]),
    auxiliary_head=dict(in_channels=192),
)
