"""SoLA-Vision-T: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224."""

_base_ = './classifier_saga_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch='tiny',
        out_indices=(3,),
        drop_path_rate=0.1,
    ),
    head=dict(in_channels=288),
)
