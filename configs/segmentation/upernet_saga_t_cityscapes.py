"""UperNet, SAGA-T: batch 2 x 8 GPUs, 80k iterations, Cityscapes 1024x1024."""

_base_ = [
    './_base_/models/upernet.py',
    './_base_/datasets/cityscapes.py',
    './_base_/schedules/adamw_80k.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(1024, 1024)),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
