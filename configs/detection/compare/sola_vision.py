"""SoLA-Vision with half the channels of T."""

_base_ = './saga.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(48, 64, 96, 144), num_heads=(2, 2, 4, 4), depths=(2, 2, 6, 2)),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[48, 64, 96, 144]),
)
