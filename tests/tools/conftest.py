"""Tiny data, and configs for it that train in about a second."""

import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmengine.runner import CheckpointLoader

ROOT = Path(__file__).resolve().parents[2]
SIZE = 32
TRAIN, VAL = 6, 2
SECONDS = itertools.count(int(time.time()))

BACKBONE = """
default_scope = '{scope}'
custom_imports = dict(imports=['saga_mm'], allow_failed_imports=False)
backbone = dict(
    type='saga_mm.SAGA',
    arch=dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2)),
    out_indices=(0, 1),
    drop_path_rate=0.3,
)
log_processor = dict(window_size=1, by_epoch={by_epoch})
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
env_cfg = dict(dist_cfg=dict(backend='nccl'))
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
data_root = '{data}'
"""

SEGMENTATION = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.0] * 3,
        std=[60.0] * 3,
        size=(32, 32),
        seg_pad_val=255,
    ),
    backbone=backbone,
    decode_head=dict(
        type='FCNHead',
        in_channels=[8, 16],
        in_index=[0, 1],
        input_transform='resize_concat',
        channels=8,
        num_convs=1,
        dropout_ratio=0.3,
        num_classes=2,
        norm_cfg=norm_cfg,
    ),
    test_cfg=dict(mode='whole'),
)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
pack = [dict(type='PackSegInputs')]
augmentation = [
    dict(type='RandomResize', scale=(32, 32), ratio_range=(1.0, 2.0)),
    dict(type='RandomCrop', crop_size=(32, 32)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
]
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    metainfo=dict(classes=('a', 'b'), palette=[[0, 0, 0], [255, 0, 0]]),
    img_suffix='.png',
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        pipeline=load + augmentation + pack,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        pipeline=load + pack,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=7, val_interval=2)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""

DETECTION = """
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[127.0] * 3, std=[60.0] * 3),
    backbone=backbone,
    neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(
            type='AnchorGenerator', scales=[2, 4], ratios=[1.0], strides=[4, 8]
        ),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5
    ),
)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
pack = [
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    )
]
resize = dict(type='Resize', scale=(32, 32), keep_ratio=True)
dataset = dict(
    type='CocoDataset',
    data_root=data_root,
    metainfo=dict(classes=('a', 'b'), palette=[(0, 0, 0), (255, 0, 0)]),
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(
        pipeline=load + [resize, dict(type='RandomFlip', prob=0.5)] + pack,
        ann_file='train.json',
        data_prefix=dict(img='images/train/'),
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        pipeline=load + [resize] + pack,
        ann_file='val.json',
        data_prefix=dict(img='images/val/'),
        test_mode=True,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + '/val.json', metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval=1),
    visualization=dict(type='DetVisualizationHook'),
)
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
"""

PURE_PYTHON = """
from mmcv.transforms import LoadImageFromFile
from mmengine.model import BaseModule
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from mmseg.models import EncoderDecoder, FCNHead, SegDataPreProcessor

from saga_mm.backbones import SAGA

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, mean=[100.0] * 3, std=[50.0] * 3),
    backbone=dict(
        type=SAGA,
        arch=dict(embed_dims=(8,), depths=(1,), num_heads=(1,)),
        out_indices=(0,),
    ),
    decode_head=dict(type=FCNHead, in_channels=8, channels=8, num_convs=1, num_classes=2),
    test_cfg=dict(mode='whole'),
)
test_dataloader = dict(
    dataset=dict(
        type=BaseSegDataset,
        metainfo=dict(classes=('a', 'b')),
        pipeline=[dict(type=kind) for kind in (LoadImageFromFile, LoadAnnotations, PackSegInputs)],
    )
)
"""


@pytest.fixture
def pure_python(tmp_path):
    """Path of a config with classes in place of names, and without a default scope."""
    path = tmp_path / 'pure.py'
    path.write_text(PURE_PYTHON)
    return path


@pytest.fixture(scope='session')
def tiny_data(tmp_path_factory):
    """A folder with images of one rectangle each, label maps, and COCO files."""
    folder = tmp_path_factory.mktemp('data')
    rng = np.random.default_rng(0)
    for split, number in (('train', TRAIN), ('val', VAL)):
        coco = dict(
            images=[], annotations=[], categories=[dict(id=1, name='a'), dict(id=2, name='b')]
        )
        for name in ('images', 'labels'):
            (folder / name / split).mkdir(parents=True)
        for i in range(number):
            image = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            labels = np.zeros((SIZE, SIZE), np.uint8)
            x, y = (int(v) for v in rng.integers(0, 16, 2))
            image[y : y + 12, x : x + 12] = 255
            labels[y : y + 12, x : x + 12] = 1
            cv2.imwrite(str(folder / 'images' / split / f'{i}.png'), image)
            cv2.imwrite(str(folder / 'labels' / split / f'{i}.png'), labels)
            coco['images'].append(dict(id=i, file_name=f'{i}.png', width=SIZE, height=SIZE))
            box = dict(id=i + 1, image_id=i, category_id=1 + i % 2, bbox=[x, y, 12, 12])
            coco['annotations'].append(dict(box, area=144, iscrowd=0))
        (folder / f'{split}.json').write_text(json.dumps(coco))
    return folder


@pytest.fixture
def tiny_seg(tmp_path, tiny_data):
    """Path of a segmentation config, trained by iterations."""
    path = tmp_path / f'seg_{tmp_path.name}.py'
    settings = BACKBONE.format(scope='mmseg', by_epoch=False, data=tiny_data)
    path.write_text(settings + SEGMENTATION)
    return path


@pytest.fixture
def tiny_det(tmp_path, tiny_data):
    """Path of a detection config, trained by epochs."""
    path = tmp_path / f'det_{tmp_path.name}.py'
    settings = BACKBONE.format(scope='mmdet', by_epoch=True, data=tiny_data)
    path.write_text(settings + DETECTION)
    return path


@pytest.fixture(autouse=True)
def own_second(monkeypatch):
    """Starts each run a second later than the one before it, in any test.

    mmengine names runs by their second, and those of the same name share a log and a visualizer.
    """
    clock = SimpleNamespace(**{**vars(time), 'time': lambda: next(SECONDS)})
    monkeypatch.setattr('mmengine.runner.runner.time', clock)


@pytest.fixture
def tool(monkeypatch):
    """Imports a script of tools/ by name, and undoes its changes to mmengine's loader."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    # mmengine sleeps for two seconds before each epoch.
    monkeypatch.setattr('mmengine.runner.loops.time', SimpleNamespace(sleep=lambda seconds: None))

    def load(name):
        spec = importlib.util.spec_from_file_location(f'tools_{name}', ROOT / f'tools/{name}.py')
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load
