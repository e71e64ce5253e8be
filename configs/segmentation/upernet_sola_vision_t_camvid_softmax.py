"""Like `upernet_sola_vision_t_camvid.py`, with softmax attention in all layers."""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', layers='softmax', drop_path_rate=0.0
    )
)
