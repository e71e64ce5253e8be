"""SoLA-Vision-T without softmax layers, trained on CamVid and otherwise
like `upernet_saga_t_camvid.py`.
"""

_base_ = './upernet_saga_t_camvid.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', layers='linear', drop_path_rate=0.0
    )
)
