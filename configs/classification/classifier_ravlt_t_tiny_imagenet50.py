"""RAVLT-T from scratch: batch 64 x 1 CPU or GPU, 20 epochs, 50 classes of Tiny ImageNet, 64x64."""

_base_ = './classifier_saga_t_tiny_imagenet50.py'

model = dict(
    backbone=dict(
        _delete_=True, type='saga_mm.RAVLT', arch='tiny', out_indices=(3,), drop_path_rate=0.1
    )
)
