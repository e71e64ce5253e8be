"""Swin, of a similar size."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=32,
        depths=[2, 2, 4, 2],
        num_heads=[1, 2, 4, 8],
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[32, 64, 128, 256]),
)
