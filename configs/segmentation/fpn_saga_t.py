"""Semantic FPN, SAGA-T: batch 4 x 4 GPUs, 80k iterations, ADE20K 512x512."""

_base_ = [
    './_base_/models/fpn.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/adamw_80k.py',
    './_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 512)))
train_dataloader = dict(batch_size=4)
