"""SoLA-Vision-T from scratch on the embedded scenes' objects, like `classifier_saga_t_demo.py`."""

_base_ = './classifier_saga_t_demo.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', out_indices=(3,), drop_path_rate=0.1
    ),
    head=dict(in_channels=288),
)
