"""PVT-T."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.PyramidVisionTransformer',
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.0,
    ),
)
