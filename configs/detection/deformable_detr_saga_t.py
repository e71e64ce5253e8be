"""Deformable DETR, SAGA-T: batch 2 x 8 GPUs, 3x (36 epochs), COCO."""

_base_ = [
    './_base_/models/deformable_detr.py',
    './_base_/datasets/coco_detection.py',
    './_base_/schedules/adamw_3x.py',
    './_base_/default_runtime.py',
]

train_dataloader = dict(dataset=dict(filter_cfg=dict(filter_empty_gt=False)))
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=1e-4), clip_grad=dict(max_norm=0.1, norm_type=2)
)
