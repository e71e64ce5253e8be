"""The data set classes, pipelines and metrics of the toolboxes read the generated folders."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import saga_mm  # noqa: F401  registers the data sets
from saga_mm.datasets.scenes import CLASSES, LAYOUTS, make_scenes, scenes_cls_dataset

SMALL = dict(train=6, val=4, size=(64, 80), progress=False)
DET_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
]
SEG_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('made') / 'scenes', **SMALL)


@pytest.fixture
def small_default(monkeypatch):
    """Reduces the size of the data set that a config makes on first use."""
    small = dataclasses.replace(LAYOUTS['scenes'], train=6, val=4, size=(64, 80))
    monkeypatch.setitem(LAYOUTS, 'scenes', small)


def dataset(toolbox, name, **cfg):
    pytest.importorskip(toolbox)
    init_default_scope(toolbox)
    return DATASETS.build(dict(type=f'saga_mm.{name}', **cfg))


@pytest.mark.parametrize('poly2mask', [True, False])
def test_detection(scenes, poly2mask):
    pipeline = [dict(step) for step in DET_PIPELINE]
    pipeline[1]['poly2mask'] = poly2mask
    data = dataset('mmdet', 'ScenesDetDataset', data_root=str(scenes), pipeline=pipeline)
    from mmdet.datasets import CocoDataset

    assert type(data) is CocoDataset
    assert data.metainfo['classes'] == CLASSES and len(data.metainfo['palette']) == len(CLASSES)
    assert len(data) == 6
    for i in range(len(data)):
        packed = data[i]
        instances = packed['data_samples'].gt_instances
        path = Path(packed['data_samples'].img_path)
        labels = cv2.imread(str(scenes / f'annotations/train/{path.stem}.png'), 0)
        union = np.zeros_like(labels)
        for mask, label in zip(instances.masks.to_ndarray(), instances.labels, strict=True):
            union[mask > 0] = label + 1
        np.testing.assert_array_equal(union, labels)
        assert not packed['data_samples'].ignored_instances.labels.numel()


def test_segmentation(scenes):
    data = dataset(
        'mmseg', 'ScenesSegDataset', data_root=str(scenes), split='val', pipeline=SEG_PIPELINE
    )
    from mmseg.datasets import BaseSegDataset

    assert type(data) is BaseSegDataset
    assert data.metainfo['classes'] == ('background', *CLASSES)
    assert len(data.metainfo['palette']) == len(CLASSES) + 1
    assert len(data) == 4
    for i in range(len(data)):
        packed = data[i]
        path = Path(packed['data_samples'].img_path)
        labels = cv2.imread(str(scenes / f'annotations/val/{path.stem}.png'), 0)
        np.testing.assert_array_equal(packed['data_samples'].gt_sem_seg.data[0], labels)
        assert packed['inputs'].shape == (3, 64, 80)


@pytest.fixture
def mmpretrain(monkeypatch):
    """Stands in for mmpretrain, whose base class takes the folder of images as text."""

    def base_dataset(data_prefix, **kwargs):
        return BaseDataset(data_prefix=dict(img_path=data_prefix), **kwargs)

    module = SimpleNamespace(BaseDataset=base_dataset)
    monkeypatch.setitem(sys.modules, 'mmpretrain', SimpleNamespace(datasets=module))
    monkeypatch.setitem(sys.modules, 'mmpretrain.datasets', module)


@pytest.mark.parametrize('lazy_init', [False, True])
def test_classification(scenes, mmpretrain, lazy_init):
    data = scenes_cls_dataset(str(scenes), 'val', lazy_init, pipeline=[], test_mode=True)
    assert data.metainfo['classes'] == CLASSES
    data.full_init()
    seen = {}
    for i in range(len(data)):
        sample = data[i]
        path = Path(sample['img_path'])
        assert path.is_file()
        labels = cv2.imread(str(scenes / f'annotations/val/{path.stem}.png'), 0)
        x1, y1, x2, y2 = sample['bbox']
        found = seen.setdefault(path.stem, np.zeros_like(labels))
        found[y1:y2, x1:x2][labels[y1:y2, x1:x2] == sample['gt_label'] + 1] = 1
    # the boxes hold each object, and nothing is in none of them
    assert len(seen) == 4
    for stem, found in seen.items():
        labels = cv2.imread(str(scenes / f'annotations/val/{stem}.png'), 0)
        np.testing.assert_array_equal(found > 0, labels > 0)


def test_arguments_go_to_the_real_data_set(scenes):
    small = dict(data_root=str(scenes), indices=2, test_mode=True)
    assert len(dataset('mmdet', 'ScenesDetDataset', **small)) == 2
    assert len(dataset('mmseg', 'ScenesSegDataset', **small)) == 2
    with pytest.raises(TypeError, match='colour'):
        dataset('mmseg', 'ScenesSegDataset', data_root=str(scenes), colour='blue')


def test_a_wrong_split(scenes):
    with pytest.raises(ValueError, match=r"split: expected 'train' or 'val', got 'test'"):
        dataset('mmdet', 'ScenesDetDataset', data_root=str(scenes), split='test')


@pytest.mark.parametrize('name', ['ScenesDetDataset', 'ScenesSegDataset'])
def test_made_on_first_use(tmp_path, small_default, name):
    root = tmp_path / 'data/scenes'
    toolbox = 'mmdet' if 'Det' in name else 'mmseg'
    assert len(dataset(toolbox, name, data_root=str(root))) == 6
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert len(dataset(toolbox, name, data_root=str(root), split='val')) == 4
    assert stamps == {path: path.stat().st_mtime_ns for path in root.rglob('*')}


def test_another_layout_is_refused(tmp_path):
    root = make_scenes(tmp_path / 'ade', layout='ade20k', **SMALL)
    with pytest.raises(ValueError, match='holds layout ade20k, version 1 instead of scenes'):
        dataset('mmseg', 'ScenesSegDataset', data_root=str(root))


@MODELS.register_module(force=True)
class Oracle(BaseModel):
    """A model that predicts the truth."""

    def forward(self, inputs, data_samples, mode):
        assert mode == 'predict'
        for sample in data_samples:
            if 'gt_sem_seg' in sample:
                sample.pred_sem_seg = sample.gt_sem_seg
            else:
                truth = sample.gt_instances
                sample.pred_instances = InstanceData(
                    bboxes=truth.bboxes.tensor,
                    labels=truth.labels,
                    scores=torch.ones(len(truth)),
                    masks=torch.from_numpy(truth.masks.to_ndarray()).bool(),
                )
        return data_samples


def validate(tmp_path, toolbox, name, pipeline, evaluator):
    pytest.importorskip(toolbox)
    # The folder and the annotation file are made while the Runner builds its loader.
    root = tmp_path / 'scenes'
    runner = Runner(
        model=dict(type='mmengine.Oracle'),
        work_dir=str(tmp_path / 'work'),
        val_dataloader=dict(
            batch_size=2,
            num_workers=1,
            collate_fn=dict(type='pseudo_collate'),
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=dict(
                type=f'saga_mm.{name}',
                data_root=str(root),
                split='val',
                test_mode=True,
                pipeline=pipeline,
            ),
        ),
        val_cfg=dict(),
        val_evaluator=evaluator(root),
        default_scope=toolbox,
        experiment_name=f'{tmp_path.name}-{toolbox}',
    )
    return runner.val()


def test_coco_metric_of_the_truth_is_one(tmp_path, small_default):
    def evaluator(root):
        ann_file = str(root / 'instances_val.json')
        return dict(type='CocoMetric', metric=['bbox', 'segm'], ann_file=ann_file)

    metrics = validate(tmp_path, 'mmdet', 'ScenesDetDataset', DET_PIPELINE, evaluator)
    assert metrics['coco/bbox_mAP'] == pytest.approx(1.0)
    assert metrics['coco/segm_mAP'] == pytest.approx(1.0)


def test_iou_metric_of_the_truth_is_100(tmp_path, small_default):
    def evaluator(root):
        return dict(type='IoUMetric', iou_metrics=['mIoU'])

    metrics = validate(tmp_path, 'mmseg', 'ScenesSegDataset', SEG_PIPELINE, evaluator)
    assert metrics['mIoU'] == metrics['aAcc'] == 100


def upstream_config(toolbox, name):
    package = pytest.importorskip(toolbox)
    init_default_scope(toolbox)
    return Config.fromfile(Path(package.__file__).parent / '.mim/configs/_base_/datasets' / name)


def test_coco_layout_under_upstreams_own_config(tmp_path, monkeypatch):
    """mmdet's unchanged coco_instance.py reads a generated data/coco."""
    monkeypatch.chdir(tmp_path)
    cfg = upstream_config('mmdet', 'coco_instance.py')
    make_scenes('data/coco', layout='coco', **SMALL | dict(train=12))
    train = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    real = type(train.dataset).METAINFO['classes']
    assert train.dataset.metainfo['classes'] == real and len(real) == 80
    ids = train.dataset.cat_ids
    assert (len(ids), ids[0], ids[11], ids[-1]) == (80, 1, 13, 90)
    batch = next(iter(train))
    assert all(len(sample.gt_instances) for sample in batch['data_samples'])
    seen = {
        label.item()
        for i in range(len(train.dataset))
        for label in train.dataset[i]['data_samples'].gt_instances.labels
    }
    assert len(seen) > 40
    val = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    assert len(val.dataset) == 4
    from mmdet.evaluation import CocoMetric

    metric = CocoMetric(**{k: v for k, v in cfg.val_evaluator.items() if k != 'type'})
    assert metric._coco_api.getImgIds() == [1, 2, 3, 4]


def test_ade20k_layout_under_upstreams_own_config(tmp_path, monkeypatch):
    """mmseg's unchanged ade20k.py reads a generated data/ade/ADEChallengeData2016."""
    monkeypatch.chdir(tmp_path)
    cfg = upstream_config('mmseg', 'ade20k.py')
    make_scenes('data/ade/ADEChallengeData2016', layout='ade20k', **SMALL | dict(train=12))
    train = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    assert len(train.dataset) == 12 and train.dataset.reduce_zero_label
    batch = next(iter(train))
    assert batch['inputs'][0].shape == (3, 512, 512)
    val = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    assert len(val.dataset) == 4
    values = np.unique(
        [cv2.imread(str(path), -1) for path in Path('.').rglob('annotations/training/*.png')]
    )
    assert values[0] == 0 and values[-1] <= 150 and len(values) > 40
    for i in range(len(val.dataset)):
        labels = val.dataset[i]['data_samples'].gt_sem_seg.data
        path = val.dataset[i]['data_samples'].seg_map_path
        raw = cv2.imread(path, -1)
        np.testing.assert_array_equal(labels[0][torch.from_numpy(raw) == 0], 255)
        assert set(np.unique(labels)) == {255} | {v - 1 for v in np.unique(raw) if v}
