"""UperNet, RAVLT-T, from scratch on CamVid, like `upernet_saga_t_camvid.py`."""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', drop_path_rate=0.0),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
