"""SoLA-Vision-T from scratch: batch 64 x 1 CPU or GPU, 20 epochs, Tiny ImageNet with 50 classes."""

_base_ = './classifier_saga_t_tiny_imagenet50.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.SoLAVision', arch='tiny', out_indices=(3,), drop_path_rate=0.1
    ),
    head=dict(in_channels=288),
)
