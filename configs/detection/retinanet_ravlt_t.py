"""RetinaNet, RAVLT-T: batch 2 x 8 GPUs, 1x (12 epochs), COCO."""

_base_ = './retinanet_saga_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.RAVLT',
        arch='tiny',
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='SyncBN'),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
