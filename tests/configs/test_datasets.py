"""Data sets that the configs read: DATA_ROOT, file names, labels, and a short training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from PIL import Image

from saga_mm.datasets.scenes import make_scenes


def write_image(path, shape=(40, 48, 3), high=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.randint(0, high, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_segmentation(root, splits, image, labels, num_labels):
    """Two images and label maps per split; `image` and `labels` are patterns of relative paths."""
    for split in splits:
        for name in 'ab':
            write_image(root / image.format(split=split, name=name))
            write_image(root / labels.format(split=split, name=name), (40, 48), num_labels)


def write_coco(root, splits, image, annotations, category):
    for split in splits:
        truth = dict(images=[], annotations=[], categories=[dict(id=1, name=category)])
        for i, name in enumerate('ab'):
            write_image(root / image.format(split=split, name=name))
            truth['images'].append(dict(id=i, file_name=f'{name}.png', height=40, width=48))
            polygon = [4, 4, 44, 4, 44, 36, 4, 36]
            truth['annotations'].append(
                dict(
                    id=i, image_id=i, category_id=1, iscrowd=0, area=1280,
                    bbox=[4, 4, 40, 32], segmentation=[polygon],
                )
            )  # fmt: skip
        path = root / annotations.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(truth))


@pytest.fixture
def layouts(tmp_path):
    """Functions that write tiny data sets in the real layouts and return the folder."""

    def camvid():
        write_segmentation(
            tmp_path, ('train', 'val'),
            'images/{split}/{name}.jpg', 'annotations/{split}/{name}.png', 11,
        )  # fmt: skip

    def idrid():
        write_segmentation(
            tmp_path, ('train', 'val'),
            'images/{split}/{name}.jpg', 'annotations/{split}/{name}.png', 6,
        )  # fmt: skip

    def ade20k():
        write_segmentation(
            tmp_path, ('training', 'validation'),
            'images/{split}/{name}.jpg', 'annotations/{split}/{name}.png', 151,
        )  # fmt: skip

    def nuclei():
        write_segmentation(
            tmp_path, ('train', 'val'), '{split}/{name}.png', 'semantic/{split}/{name}.png', 2
        )
        write_coco(
            tmp_path, ('train', 'val'), '{split}/{name}.png', 'instances_{split}.json', 'nucleus'
        )

    def coco():
        write_coco(
            tmp_path, ('train', 'val'),
            '{split}2017/{name}.png', 'annotations/instances_{split}2017.json', 'person',
        )  # fmt: skip

    def scenes():
        make_scenes(tmp_path, train=2, val=2, size=(96, 128), progress=False)

    writers = dict(
        camvid=camvid, idrid=idrid, ade20k=ade20k, nuclei=nuclei, coco=coco, scenes=scenes
    )

    def write(name):
        writers[name]()
        return tmp_path

    return write


def test_data_root_moves_every_path(config_path, load_config, monkeypatch):
    before = load_config(config_path)
    default = before.data_root
    monkeypatch.setenv('DATA_ROOT', '/elsewhere/set')
    after = load_config(config_path)
    assert default.startswith('data/')
    assert default not in after.pretty_text
    for split in ('train', 'val', 'test'):
        assert after[f'{split}_dataloader'].dataset.data_root == '/elsewhere/set'
    if after.default_scope == 'mmdet':
        assert after.val_evaluator.ann_file.startswith('/elsewhere/set/')


SETS = [
    ('detection/mask_rcnn_saga_t.py', 'coco'),
    ('detection/mask_rcnn_saga_t_3x.py', 'coco'),
    ('detection/mask_rcnn_saga_t_demo.py', 'scenes'),
    ('detection/mask_rcnn_saga_t_nuclei.py', 'nuclei'),
    ('detection/retinanet_saga_t.py', 'coco'),
    ('segmentation/upernet_saga_t.py', 'ade20k'),
    ('segmentation/upernet_saga_t_camvid.py', 'camvid'),
    ('segmentation/segformer_head_saga_t_idrid.py', 'idrid'),
    ('segmentation/compare_idrid/saga.py', 'idrid'),
    ('segmentation/upernet_saga_t_demo.py', 'scenes'),
    ('segmentation/upernet_saga_t_nuclei.py', 'nuclei'),
]


@pytest.mark.parametrize('config, name', SETS)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_reads_its_layout(config, name, split, load_config, layouts, monkeypatch):
    root = layouts(name)
    monkeypatch.setenv('DATA_ROOT', str(root))
    cfg = load_config(config)
    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    assert len(dataset) == 2
    item = dataset[0]
    assert item['inputs'].shape[0] == 3
    sample = item['data_samples']
    classes = len(dataset.metainfo['classes'])
    if cfg.default_scope == 'mmdet':
        assert len(sample.gt_instances) > 0
        assert sample.gt_instances.labels.max() < classes
        assert ('masks' in sample.gt_instances) == ('mask' in config)
        # The heads undo the scale of a test image.
        assert split == 'train' or 'scale_factor' in sample.metainfo
    else:
        labels = set(sample.gt_sem_seg.data.unique().tolist())
        assert len(labels) > 1
        assert labels <= {*range(classes), 255}


@pytest.mark.parametrize('config', ['saga', 'pvt'])
def test_documented_widths_of_idrid(config, load_config, layouts, monkeypatch):
    page = Path(__file__).parents[2] / 'docs/benchmarks/learning.md'
    keys = set(re.findall(r'"(\w+_dataloader\.\S+)=\(\$width,\$width\)"', page.read_text()))
    assert len(keys) == 3
    monkeypatch.setenv('DATA_ROOT', str(layouts('idrid')))
    cfg = load_config(f'segmentation/compare_idrid/{config}.py')
    cfg.merge_from_dict(dict.fromkeys(keys, (512, 512)))
    # images have 48x40 pixels
    for split in ('val', 'test'):
        item = DATASETS.build(cfg[f'{split}_dataloader'].dataset)[0]
        assert item['inputs'].shape == (3, 427, 512)
        assert item['data_samples'].gt_sem_seg.shape == (40, 48)
    train = cfg.train_dataloader.dataset.pipeline
    assert (train[2].type, train[2].scale) == ('Resize', (512, 512))
    assert DATASETS.build(cfg.train_dataloader.dataset)[0]['inputs'].shape == (3, 256, 256)


def test_ade20k_ignores_label_zero(load_config, layouts, monkeypatch):
    root = layouts('ade20k')
    for path in root.glob('annotations/validation/*.png'):
        Image.fromarray(np.repeat(np.uint8([[0, 1, 150]]), 3, axis=0)).save(path)
    monkeypatch.setenv('DATA_ROOT', str(root))
    cfg = load_config('segmentation/upernet_saga_t.py')
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]['data_samples']
    assert sample.gt_sem_seg.data[0, 0].tolist() == [255, 0, 149]


def test_nuclei_crops_leave_no_empty_box(load_config, layouts, monkeypatch):
    root = layouts('nuclei')
    path = root / 'instances_train.json'
    truth = json.loads(path.read_text())
    for annotation in truth['annotations']:
        # The object is a triangle in a corner of its box, so many crops meet the box but no object.
        annotation['segmentation'] = [[4, 4, 14, 4, 4, 14]]
    path.write_text(json.dumps(truth))
    monkeypatch.setenv('DATA_ROOT', str(root))
    cfg = load_config('detection/mask_rcnn_saga_t_nuclei.py')
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    for _ in range(20):
        boxes = dataset[0]['data_samples'].gt_instances.bboxes
        assert len(boxes) == 1
        assert (boxes.widths > 0).all() and (boxes.heights > 0).all()


@pytest.mark.parametrize(
    'config, name, length, metric',
    [
        ('segmentation/upernet_saga_t_camvid.py', 'camvid', 'max_iters', 'mIoU'),
        ('detection/mask_rcnn_saga_t_demo.py', 'scenes', 'max_epochs', 'coco/segm_mAP'),
    ],
)
def test_trains_and_validates(
    config, name, length, metric, load_config, layouts, tmp_path, monkeypatch
):
    """A short run of the config, whose schedule becomes shorter as well."""
    monkeypatch.setenv('DATA_ROOT', str(layouts(name)))
    cfg = load_config(config)
    cfg.train_cfg[length] = 2
    cfg.train_dataloader.batch_size = 2
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.experiment_name = tmp_path.name
    runner = Runner.from_cfg(cfg)
    runner.train()
    # Two iterations, or two epochs with one iteration each.
    assert runner.iter == 2
    assert runner.param_schedulers[-1].end == 2
    assert list((tmp_path / 'work').glob('*_2.pth'))
    assert f'val/{metric}' in runner.message_hub.log_scalars
