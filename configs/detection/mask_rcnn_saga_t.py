"""Mask R-CNN, SAGA-T: batch 2 x 8 GPUs, 1x (12 epochs), COCO.

No pretrained weights are published. To start from your own, add
`--cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE`.
"""

_base_ = [
    './_base_/models/mask_rcnn.py',
    './_base_/datasets/coco_instance.py',
    './_base_/schedules/adamw_1x.py',
    './_base_/default_runtime.py',
]
