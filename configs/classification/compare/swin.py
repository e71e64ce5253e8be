"""Swin, of a similar size."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.SwinTransformer',
        embed_dims=32,
        depths=[2, 2, 4, 2],
        num_heads=[1, 2, 4, 8],
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
)
