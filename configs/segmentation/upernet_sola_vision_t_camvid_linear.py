"""Like `upernet_sola_vision_t_camvid.py`, with no softmax layer."""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', layers='linear', drop_path_rate=0.0
    )
)
