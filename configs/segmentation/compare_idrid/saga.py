"""SegFormer's head, SAGA-T: batch 8, 450 iterations, IDRiD at a width of 1024, crops of 256x256.

The configs of this folder differ in the backbone only. docs/benchmarks/learning.md has the commands
that train them at several widths. `DATA_ROOT=/path/to/idrid` names the folder of the data.
"""

_base_ = '../segformer_head_saga_t_idrid.py'

# the width, of which the height follows
scale = (1024, 1024)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256), cat_max_ratio=0.95),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
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
