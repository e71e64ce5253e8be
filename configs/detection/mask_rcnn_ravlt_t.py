"""Mask R-CNN, RAVLT-T: batch 2 x 8 GPUs, 1x (12 epochs), COCO.

To start from the published ImageNet weights, add
`--cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE`.
"""

_base_ = './mask_rcnn_saga_t.py'

model = dict(
    backbone=dict(_delete_=True, type='saga_mm.RAVLT', arch='tiny', norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
