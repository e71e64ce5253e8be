"""Like `upernet_sola_vision_t_camvid.py`, with softmax layers at the start of stages 3 and 4."""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', layers='front', drop_path_rate=0.0
    )
)
