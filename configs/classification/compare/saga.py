"""SAGA of the widths of PVTv2-B0: batch 64, 6 epochs, 50 classes of Tiny ImageNet, 64x64.

The configs of this folder differ in the backbone only. `tools/compare_training.py` trains them.
"""

_base_ = '../classifier_saga_t_tiny_imagenet50.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SAGA',
        out_indices=(3,),
        drop_path_rate=0.1,
        arch=dict(
            embed_dims=(32, 64, 160, 256),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4),
        ),
    ),
    neck=dict(type='saga_mm.MeanOfLastMap'),
    head=dict(in_channels=256),
)
train_cfg = dict(max_epochs=6, val_interval=6)
custom_imports = dict(imports=['saga_mm', 'saga_mm.analysis.pooling'])
