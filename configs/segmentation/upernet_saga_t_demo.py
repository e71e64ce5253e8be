"""UperNet, SAGA-T, from scratch: batch 8 x 1 CPU or GPU, 550 iterations, the embedded scenes."""

_base_ = [
    './_base_/models/upernet_small.py',
    './_base_/datasets/scenes.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(96, 128)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
train_cfg = dict(max_iters=550, val_interval=550)
default_hooks = dict(checkpoint=dict(interval=110))
