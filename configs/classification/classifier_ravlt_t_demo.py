"""RAVLT-T from scratch on the embedded scenes' objects, like `classifier_saga_t_demo.py`."""

_base_ = './classifier_saga_t_demo.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.RAVLT', arch='tiny', out_indices=(3,), drop_path_rate=0.1
    )
)
