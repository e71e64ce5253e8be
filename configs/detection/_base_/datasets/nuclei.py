"""Nuclei of the 2018 Data Science Bowl as COCO instances of one class; batch 4.

`DATA_ROOT` names the folder that holds `{train,val}` (PNG, 256x256) and
`instances_{train,val}.json`. A nucleus is about 13 pixels wide, less than four tokens of the finest
map, so images are enlarged to 512x512. Training uses 256x256 crops of the enlarged images.
"""

dataset_type = 'CocoDataset'
data_root = '{{$DATA_ROOT:data/nuclei}}'
metainfo = dict(classes=('nucleus',), palette=[(220, 20, 60)])

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(512, 512), ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(256, 256), recompute_bbox=True),
    # A crop may leave nothing of a nucleus, and an empty box would make the loss NaN.
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2)),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(512, 512), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=None,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=metainfo,
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='instances_val.json',
        data_prefix=dict(img='val/'),
        metainfo=metainfo,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type='CocoMetric', ann_file=f'{data_root}/instances_val.json', metric=['bbox', 'segm']
)
test_evaluator = val_evaluator
