"""UperNet with heads of 128 channels, SAGA-T: batch 2 x 8 GPUs, 160k iterations, ADE20K 512x512."""

_base_ = [
    './_base_/models/upernet128.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/adamw_160k.py',
    './_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(size=(512, 512)))
