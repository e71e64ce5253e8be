"""Mask R-CNN, SoLA-Vision-T, from scratch on nuclei, like `mask_rcnn_saga_t_nuclei.py`."""

_base_ = './mask_rcnn_saga_t_nuclei.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.SoLAVision', arch='tiny', drop_path_rate=0.05),
    neck=dict(in_channels=[96, 128, 192, 288]),
)
