"""SegFormer's head (64), SAGA of the widths of PVTv2-B0: batch 4, 900 iterations, IDRiD 256x256.

Images and labels are resized to a width of 1024. docs/benchmarks/learning.md has the commands that
train at other widths. `DATA_ROOT=/path/to/half` names a folder of images and labels at half their
size, which docs/whole_images.md makes. The configs of this folder differ in the backbone only.
"""

_base_ = '../compare_heads/segformer_head_idrid.py'

# the width, of which the height follows
scale = (1024, 1024)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256), cat_max_ratio=0.99),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    # labels keep their size: predictions are enlarged to it
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
model = dict(data_preprocessor=dict(size=(256, 256)))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=900, val_interval=900)
default_hooks = dict(checkpoint=dict(interval=900))
