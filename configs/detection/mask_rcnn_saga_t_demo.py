"""Mask R-CNN, SAGA-T, from scratch: batch 4 x 1 CPU or GPU, 4 epochs, the embedded scenes."""

_base_ = [
    './_base_/models/mask_rcnn_small.py',
    './_base_/datasets/scenes.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    # Objects are smaller than those of COCO, so anchors have 16, 32, ..., 256 pixels.
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(finest_scale=28),
        bbox_head=dict(num_classes=10),
        mask_roi_extractor=dict(finest_scale=28),
        mask_head=dict(num_classes=10),
    ),
)
train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(logger=dict(interval=10))
