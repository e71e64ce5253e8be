"""RAVLT-S: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224.

The paper reports a top-1 accuracy of 84.4 for its own training and classifier.
"""

_base_ = './classifier_ravlt_t.py'

model = dict(backbone=dict(arch='small', drop_path_rate=0.15))
