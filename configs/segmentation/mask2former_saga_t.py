"""Mask2Former, SAGA-T: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512. Needs mmdet."""

_base_ = [
    './_base_/models/mask2former.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/adamw_160k.py',
    './_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 512)))
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05), clip_grad=dict(max_norm=0.01, norm_type=2)
)
