"""RetinaNet, RAVLT-L: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './retinanet_saga_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.RAVLT',
        arch='large',
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='SyncBN'),
    ),
    neck=dict(in_channels=[192, 448, 640]),
)
