"""PVT."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmdet.PyramidVisionTransformer',
        pretrain_img_size=64,
        embed_dims=32,
        num_layers=[2, 2, 2, 2],
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
)
