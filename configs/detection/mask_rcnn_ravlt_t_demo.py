"""Mask R-CNN, RAVLT-T, from scratch on the embedded scenes, like `mask_rcnn_saga_t_demo.py`."""

_base_ = './mask_rcnn_saga_t_demo.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', drop_path_rate=0.05),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
