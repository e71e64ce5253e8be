"""PVT."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.PyramidVisionTransformer',
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        drop_path_rate=0.0,
    ),
)
