"""SAGA-S: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224."""

_base_ = './classifier_saga_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.2))
