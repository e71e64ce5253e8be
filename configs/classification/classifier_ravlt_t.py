"""RAVLT-T: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224.

The classifier is a linear layer on the mean of the map, which has fewer parameters than the
authors' one.
"""

_base_ = './classifier_saga_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.RAVLT',
        arch='tiny',
        out_indices=(3,),
        drop_path_rate=0.1,
        norm_cfg=dict(type='SyncBN'),
    ),
)
