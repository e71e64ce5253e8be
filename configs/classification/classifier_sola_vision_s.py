"""SoLA-Vision-S: batch 128 x 8 GPUs, 300 epochs, ImageNet-1K 224x224."""

_base_ = './classifier_saga_t.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch='small',
        out_indices=(3,),
        drop_path_rate=0.2,
    ),
    head=dict(in_channels=768),
)
