"""SegFormer's head (64), SAGA of the widths of PVTv2-B0: batch 4, 1300 iterations, IDRiD 384x384.

`upernet128_idrid.py` differs in the head only. Images are not resized: `DATA_ROOT=/path/to/half`
names a folder of images and labels at half their size, which docs/whole_images.md makes.
"""

_base_ = '../segformer_head_saga_t_idrid.py'

# lesions are less than a hundredth of the pixels
class_weight = [0.3, 8.0, 4.0, 2.0, 6.0, 1.0]
model = dict(
    data_preprocessor=dict(size=(384, 384)),
    backbone=dict(
        _delete_=True,
        type='saga_mm.SAGA',
        drop_path_rate=0.0,
        arch=dict(
            embed_dims=(32, 64, 160, 256),
            depths=(2, 2, 2, 2),
            num_heads=(1, 2, 5, 8),
            mlp_ratios=(8, 8, 4, 4),
        ),
    ),
    decode_head=dict(
        in_channels=[32, 64, 160, 256],
        channels=64,
        loss_decode=dict(class_weight=class_weight),
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(384, 384), cat_max_ratio=0.99),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_iters=1300, val_interval=1300)
auto_scale_lr = dict(base_batch_size=4)
