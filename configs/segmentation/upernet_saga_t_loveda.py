"""UperNet, SAGA-T: batch 2 x 8 GPUs, 80k iterations, LoveDA 512x512."""

_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/loveda.py',
    './_base_/schedules/adamw_80k.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=7),
    auxiliary_head=dict(num_classes=7),
)
