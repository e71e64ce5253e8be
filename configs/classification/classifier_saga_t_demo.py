"""SAGA-T from scratch: batch 32 x 1 CPU or GPU, 5 epochs, the objects of the embedded scenes."""

_base_ = [
    './_base_/models/classifier.py',
    './_base_/datasets/scenes.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(num_classes=10),
    head=dict(num_classes=10, topk=(1,)),
)
auto_scale_lr = dict(base_batch_size=32)
train_cfg = dict(max_epochs=5, val_interval=5)
default_hooks = dict(logger=dict(interval=10))
