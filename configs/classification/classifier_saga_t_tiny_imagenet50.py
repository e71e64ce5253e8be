"""SAGA-T from scratch: batch 64 x 1 CPU or GPU, 20 epochs, 50 classes of Tiny ImageNet, 64x64.

`DATA_ROOT=/path/to/tiny_imagenet50` names the folder of the data.
"""

_base_ = [
    './_base_/models/classifier.py',
    './_base_/datasets/tiny_imagenet50.py',
    './_base_/schedules/adamw_short.py',
    './_base_/default_runtime.py',
]

model = dict(data_preprocessor=dict(num_classes=50), head=dict(num_classes=50))
