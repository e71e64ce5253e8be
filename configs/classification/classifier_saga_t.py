"""SAGA-T: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224.

Needs mmpretrain: `pip install 'saga_mm[onedl,pretrain]'`.
"""

_base_ = [
    './_base_/models/classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/adamw_300e.py',
    './_base_/default_runtime.py',
]

model = dict(
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
