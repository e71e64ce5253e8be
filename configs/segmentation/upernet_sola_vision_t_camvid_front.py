"""SoLA-Vision-T with softmax layers at the start of stages 3 and 4, trained on CamVid and otherwise
like `upernet_saga_t_camvid.py`.
"""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', pattern='front', drop_path_rate=0.0
    ),
    decode_head=dict(in_channels=[96, 128, 192, 288]),
    auxiliary_head=dict(in_channels=192),
)
