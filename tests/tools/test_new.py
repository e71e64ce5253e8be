"""The configs that tools/new.py writes for data of every kind: they train and test."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from saga_mm.apis import test as evaluate
from saga_mm.apis import train

SIZE = 48
ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / 'shared/data'
# a model that trains in a second
SMALL = {
    'model.backbone.arch': dict(
        _delete_=True, embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)
    ),
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.num_workers': 0,
    'val_dataloader.persistent_workers': False,
    'test_dataloader.num_workers': 0,
    'test_dataloader.persistent_workers': False,
    'train_dataloader.batch_size': 2,
}
SEGMENTOR = {
    'model.decode_head.in_channels': [8, 8, 16, 16],
    'model.decode_head.channels': 8,
    'train_cfg.max_iters': 2,
    'train_cfg.val_interval': 2,
    'default_hooks.checkpoint.interval': 2,
}
DETECTOR = {
    'train_cfg.max_epochs': 1,
    'model.neck.in_channels': [8, 16, 16],
    'model.neck.out_channels': 16,
    'model.bbox_head.in_channels': 16,
    'model.bbox_head.feat_channels': 16,
}
MASK_RCNN = {
    'train_cfg.max_epochs': 1,
    'model.neck.in_channels': [8, 8, 16, 16],
    'model.neck.out_channels': 16,
    'model.rpn_head.in_channels': 16,
    'model.roi_head.bbox_roi_extractor.out_channels': 16,
    'model.roi_head.bbox_head.in_channels': 16,
    'model.roi_head.mask_roi_extractor.out_channels': 16,
    'model.roi_head.mask_head.in_channels': 16,
    'model.roi_head.mask_head.conv_out_channels': 16,
}


def pixels(dtype=np.uint8, bands=3, seed=0):
    high = 60000 if dtype == np.uint16 else 255
    values = np.random.default_rng(seed).integers(0, high, (SIZE, SIZE, bands))
    return values.astype(dtype).squeeze()


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.tif':
        tifffile = pytest.importorskip('tifffile')
        tifffile.imwrite(path, image)
    else:
        assert cv2.imwrite(str(path), image)


def label_map(values=(0, 1), dtype=np.uint8):
    """The first value, and a rectangle of each other."""
    labels = np.full((SIZE, SIZE), values[0], dtype)
    for i, value in enumerate(values[1:]):
        labels[10 + 8 * i : 18 + 8 * i, 8:40] = value
    return labels


def save_color_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.array(values, np.uint8)
    Image.fromarray(colors[label_map(range(len(values)))]).save(path)


def make_pairs(root, image=pixels, suffix='.png', mask=label_map, number=6):
    for i in range(number):
        save(root / f'images/{i}{suffix}', image(seed=i))
        save(root / f'masks/{i}.png', mask())


def new(tool, root, out, task='segmentation', *options):
    arguments = ['--task', task, '--data', str(root), '--out', str(out), *options]
    tool('new').main(arguments)
    return Config.fromfile(out)


def rgba(seed=0, opaque=True):
    image = pixels(bands=4, seed=seed)
    if opaque:
        image[..., 3] = 255
    return image


IMAGES = {
    'colour': (pixels, '.png', 3),
    'JPEG': (pixels, '.jpg', 3),
    'one channel': (lambda seed: pixels(bands=1, seed=seed), '.png', 1),
    'one channel, JPEG': (lambda seed: pixels(bands=1, seed=seed), '.jpg', 1),
    'opaque': (rgba, '.png', 3),
    'four channels': (lambda seed: rgba(seed, opaque=False), '.png', 4),
    '16 bits': (lambda seed: pixels(np.uint16, 1, seed), '.png', 1),
    '16 bits, colour': (lambda seed: pixels(np.uint16, 3, seed), '.png', 3),
    '16 bits, TIFF': (lambda seed: pixels(np.uint16, 1, seed), '.tif', 1),
    'floats': (lambda seed: pixels(np.float32, 1, seed) / 7, '.tif', 1),
    'two bands': (lambda seed: pixels(np.uint16, 2, seed), '.tif', 2),
    'five bands': (lambda seed: pixels(np.uint16, 5, seed), '.tif', 5),
    'five pages': (lambda seed: np.moveaxis(pixels(np.uint16, 5, seed), 2, 0), '.tif', 5),
}
TRAINED = ('one channel', 'five pages')


@pytest.mark.parametrize('name', IMAGES)
def test_images_of_each_kind(tool, tmp_path, name):
    image, suffix, channels = IMAGES[name]
    make_pairs(tmp_path / 'data', image, suffix)
    out = tmp_path / 'config.py'
    cfg = new(tool, tmp_path / 'data', out)
    assert cfg.model.backbone.get('in_channels', 3) == channels
    init_default_scope('mmseg')
    inputs = load_normalized(cfg)
    assert inputs.shape[1] == channels
    # one image is near the statistics of all
    np.testing.assert_allclose(inputs.mean((0, 2, 3)), 0, atol=0.1)
    np.testing.assert_allclose(inputs.std((0, 2, 3)), 1, atol=0.1)
    if name in TRAINED:
        train_and_test(out, tmp_path, SEGMENTOR)


def load_normalized(cfg):
    """The inputs of the backbone for the images of a validation, of one size."""
    from mmengine.dataset import pseudo_collate
    from mmseg.registry import DATASETS, MODELS

    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    batch = pseudo_collate([dataset[i] for i in range(len(dataset))])
    return preprocessor(batch, training=False)['inputs'].numpy()


def train_and_test(out, tmp_path, options):
    options = SMALL | options
    train(out, work_dir=tmp_path / 'work', options=options, quiet=True)
    (checkpoint,) = (tmp_path / 'work').glob('*_[0-9]*.pth')
    options = {key: value for key, value in options.items() if 'default_hooks' not in key}
    evaluate(out, checkpoint, work_dir=tmp_path / 'test', options=options, quiet=True)


MASKS = {
    '0 and 255': ((0, 255), 2, {0, 1}),
    'ignored': ((0, 1, 255), 2, {0, 1, 255}),
    'grey levels': ((0, 100, 200), 3, {0, 1, 2}),
    'a class in no mask': ((0, 1, 3), 4, {0, 1, 3}),
    'more than 8 bits': ((0, 1000), 2, {0, 1}),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks_of_each_kind(tool, tmp_path, name):
    values, classes, labels = MASKS[name]
    dtype = np.uint16 if max(values) > 255 else np.uint8
    make_pairs(tmp_path / 'data', mask=lambda: label_map(values, dtype))
    cfg = new(tool, tmp_path / 'data', tmp_path / 'config.py')
    assert cfg.model.decode_head.num_classes == len(cfg.metainfo.classes) == classes
    assert labels_of(cfg) == labels


def labels_of(cfg):
    from mmseg.registry import DATASETS

    init_default_scope('mmseg')
    sample = DATASETS.build(cfg.val_dataloader.dataset)[0]['data_samples']
    return set(np.unique(sample.gt_sem_seg.data.numpy()).tolist())


def test_colour_masks_train(tool, tmp_path):
    colors = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    make_pairs(tmp_path / 'data')
    for path in (tmp_path / 'data/masks').iterdir():
        save_color_mask(path, colors)
    out = tmp_path / 'config.py'
    cfg = new(tool, tmp_path / 'data', out)
    # in ascending order
    assert cfg.load[-1] == dict(
        type='saga_mm.LoadLabelMap', values=[(0, 0, 0), (0, 0, 255), (255, 0, 0)]
    )
    assert cfg.metainfo.palette == [[0, 0, 0], [0, 0, 255], [255, 0, 0]]
    assert labels_of(cfg) == {0, 1, 2}
    train_and_test(out, tmp_path, SEGMENTOR)


@pytest.mark.parametrize('text', ['red', '1,2', '-1', '1.5', '1,2,3,4', ''])
def test_what_is_no_value_of_a_mask_is_named(tool, capsys, text):
    with pytest.raises(SystemExit):
        tool('new').main(['--task', 'segmentation', '--data', '.', f'--ignore={text}'])
    assert f'expected a value or a colour R,G,B, got {text!r}' in capsys.readouterr().err


def test_a_colour_is_ignored(tool, tmp_path):
    make_pairs(tmp_path / 'data')
    for path in (tmp_path / 'data/masks').iterdir():
        save_color_mask(path, [(0, 0, 0), (255, 0, 0), (0, 0, 255)])
    cfg = new(tool, tmp_path / 'data', tmp_path / 'config.py', 'segmentation', '--ignore', '0,0,0')
    assert labels_of(cfg) == {0, 1, 255}


def test_options_for_classes(tool, tmp_path):
    make_pairs(tmp_path / 'data', mask=lambda: label_map((0, 1, 2)))
    options = ('--ignore', '0', '--classes', 'cat', 'dog')
    cfg = new(tool, tmp_path / 'data', tmp_path / 'config.py', 'segmentation', *options)
    assert cfg.metainfo.classes == ('cat', 'dog')
    assert labels_of(cfg) == {0, 1, 255}
    (tmp_path / 'data/classes.txt').write_text('a\nb\nc\n')
    cfg = new(tool, tmp_path / 'data', tmp_path / 'other.py')
    assert cfg.metainfo.classes == ('a', 'b', 'c')


LAYOUTS = {
    'split below': ('images/{s}/{i}.png', 'annotations/{s}/{i}.png', False),
    'split above': ('{s}/images/{i}.png', '{s}/labels/{i}.png', False),
    'CamVid': ('{s}/{i}.png', '{s}annot/{i}.png', False),
    'joined': ('{s}_images/{i}.png', '{s}_masks/{i}.png', False),
    'joined the other way': ('images_{s}/{i}.png', 'labels-{s}/{i}.png', False),
    'years': ('images/{s}2017/{i}.png', 'annotations/{s}2017/{i}.png', False),
    'masks below the images': ('{s}/{i}.png', 'semantic/{s}/{i}.png', False),
    'side by side': ('{s}/{i}.png', '{s}/{i}_mask.png', True),
    'subfolders': ('img/{s}/a/{i}.png', 'gt/{s}/a/{i}_gt.png', False),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts(tool, tmp_path, name):
    image, mask, has_list = LAYOUTS[name]
    for split, number in (('train', 4), ('val', 2)):
        for i in range(number):
            save(tmp_path / 'data' / image.format(s=split, i=i), pixels(seed=i))
            save(tmp_path / 'data' / mask.format(s=split, i=i), label_map())
    cfg = new(tool, tmp_path / 'data', tmp_path / 'config.py')
    check_lengths(cfg, 4, 2)
    assert bool(list(tmp_path.glob('*.txt'))) is has_list


def check_lengths(cfg, *numbers):
    from mmseg.registry import DATASETS

    init_default_scope('mmseg')
    for split, number in zip(('train', 'val'), numbers, strict=True):
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        assert len(dataset) == number
        for i in range(number):
            sample = dataset[i]['data_samples']
            assert Path(sample.seg_map_path).is_file()


def test_what_is_left_out_is_named(tool, tmp_path, capsys):
    data = tmp_path / 'data'
    make_pairs(data, number=12)
    (data / 'images/0.png').write_bytes((data / 'images/0.png').read_bytes()[:2000])
    (data / 'images/1.png').write_bytes(b'')
    (data / 'masks/2.png').unlink()
    (data / 'images/3.png').unlink()
    save(data / 'masks/4.png', label_map()[:20])
    save(data / 'masks/5.png', pixels(seed=5))
    save_color_mask(data / 'masks/6.png', [(0, 0, 0), (9, 9, 9)])
    before = sorted(data.rglob('*'))
    cfg = new(tool, data, tmp_path / 'config.py')
    assert sorted(data.rglob('*')) == before
    told = capsys.readouterr().out
    for reason in (
        '2 broken images: images/0.png (',
        '1 images without a mask: images/2.png',
        '1 masks without an image: masks/3.png',
        '1 masks of another size than the image: masks/4.png (48x20 for 48x48)',
        '1 masks that can not be used: masks/5.png (it has 2',
        '1 masks with colours, while most have one channel: masks/6.png',
    ):
        assert f'left out: {reason}' in told
    check_lengths(cfg, 4, 1)


def test_images_with_several_suffixes(tool, tmp_path):
    make_pairs(tmp_path / 'data')
    for i in range(6, 12):
        save(tmp_path / f'data/images/{i}.jpg', pixels(seed=i))
        save(tmp_path / f'data/masks/{i}.png', label_map())
    check_lengths(new(tool, tmp_path / 'data', tmp_path / 'config.py'), 10, 2)


@pytest.fixture
def coco(tmp_path):
    """A folder with two COCO files, of boxes of two classes."""
    for split, number in (('train', 4), ('val', 2)):
        content = dict(
            images=[], annotations=[], categories=[dict(id=3, name='a'), dict(id=7, name='b')]
        )
        for i in range(number):
            save(tmp_path / f'data/{split}/{i}.jpg', pixels(seed=i))
            content['images'].append(dict(id=i, file_name=f'{i}.jpg', width=SIZE, height=SIZE))
            box = dict(id=i + 1, image_id=i, category_id=(3, 7)[i % 2], bbox=[5, 6, 20, 20])
            content['annotations'].append(dict(box, area=400, iscrowd=0))
        path = tmp_path / f'data/annotations/instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return tmp_path / 'data'


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_coco_boxes(tool, tmp_path, coco):
    out = tmp_path / 'config.py'
    cfg = new(tool, coco, out, 'detection')
    assert cfg.model.type == 'RetinaNet' and cfg.model.bbox_head.num_classes == 2
    assert cfg.metainfo.classes == ('a', 'b')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py', 'data']
    train_and_test(out, tmp_path, DETECTOR)


def strip(content):
    for item in content['annotations']:
        for key in ('id', 'area', 'iscrowd'):
            del item[key]
    for item in content['images']:
        del item['width'], item['height']


def test_what_coco_lacks_is_added(tool, tmp_path, coco):
    for split in ('train', 'val'):
        edit(coco / f'annotations/instances_{split}.json', strip)
        for path in coco.glob(f'{split}/*.jpg'):
            save(path.with_suffix('.png'), pixels(np.uint16, 1))
            path.unlink()
        edit(
            coco / f'annotations/instances_{split}.json',
            lambda content: [i.update(file_name=f'{i["id"]}.png') for i in content['images']],
        )
    out = tmp_path / 'config.py'
    cfg = new(tool, coco, out, 'detection')
    assert cfg.model.backbone.in_channels == 1
    content = json.loads((tmp_path / 'config_train.json').read_text())
    assert [(item['id'], item['area']) for item in content['annotations']] == [
        (i, 400) for i in (1, 2, 3, 4)
    ]
    assert {item['width'] for item in content['images']} == {SIZE}
    train_and_test(out, tmp_path, DETECTOR)


def make_null(content):
    for item in content['annotations']:
        item.update(area=None, iscrowd=None)
    content['annotations'][0]['area'] = '400'
    content['annotations'][1]['area'] = 123
    for item in content['images']:
        item.update(width=None, height=None)


def test_what_is_null_in_coco_is_replaced(tool, tmp_path, coco):
    for split in ('train', 'val'):
        edit(coco / f'annotations/instances_{split}.json', make_null)
    out = tmp_path / 'config.py'
    new(tool, coco, out, 'detection')
    content = json.loads((tmp_path / 'config_train.json').read_text())
    assert [item['area'] for item in content['annotations']] == [400, 123, 400, 400]
    assert {item['iscrowd'] for item in content['annotations']} == {0}
    assert {(item['width'], item['height']) for item in content['images']} == {(SIZE, SIZE)}
    train_and_test(out, tmp_path, DETECTOR)


def make_boxes_null(content):
    for item in content['annotations']:
        item['bbox'][3] = None


COCO_MISTAKES = {
    'no categories': (lambda c: c['categories'].clear(), 'categories must have different ids'),
    'no names': (lambda c: c.update(categories=[dict(id=3)]), 'categories must have names'),
    'equal names': (
        lambda c: c.update(categories=[dict(id=3, name='a'), dict(id=7, name='a')]),
        'categories must have different ids and names',
    ),
    'no file names': (lambda c: c['images'][0].pop('file_name'), 'must have a file_name'),
    'equal ids': (lambda c: c['images'][0].update(id=1), 'images must have different ids'),
    'no images': (lambda c: c['images'].clear(), 'lists no images'),
    'no objects': (lambda c: c['annotations'].clear(), 'there must be objects for train, got none'),
    'no box': (
        make_boxes_null,
        'there must be objects for train, got none; left out: 4 objects without a box of four '
        'numbers: annotation 1, annotation 2, annotation 3, annotation 4',
    ),
    'no dict for a category': (
        lambda c: c['categories'].append('c'),
        "instances_train.json: categories must be dicts, got 'c'",
    ),
    'no dict for an image': (
        lambda c: c['images'].append(None),
        'instances_train.json: images must be dicts, got None',
    ),
    'other categories': (
        lambda c: c['categories'].reverse(),
        'the COCO files must have the same categories',
    ),
}


@pytest.mark.parametrize('name', COCO_MISTAKES)
def test_mistakes_in_coco_are_one_line(tool, tmp_path, coco, name):
    spoil, expected = COCO_MISTAKES[name]
    edit(coco / 'annotations/instances_train.json', spoil)
    with pytest.raises(SystemExit) as error:
        new(tool, coco, tmp_path / 'out/config.py', 'detection')
    assert expected in str(error.value) and '\n' not in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_coco_masks_without_a_split(tool, tmp_path, coco):
    shutil.rmtree(coco / 'val')
    (coco / 'annotations/instances_val.json').unlink()
    (coco / 'annotations/instances_train.json').rename(coco / 'all.json')

    def add_masks(content):
        for item in content['annotations']:
            item['segmentation'] = [[5, 6, 25, 6, 25, 26, 5, 26]]

    edit(coco / 'all.json', add_masks)
    out = tmp_path / 'config.py'
    cfg = new(tool, coco, out, 'detection')
    assert cfg.model.type == 'MaskRCNN'
    assert cfg.model.roi_head.mask_head.num_classes == 2
    assert {path.name for path in tmp_path.glob('*.json')} == {
        'config_train.json',
        'config_val.json',
    }
    train_and_test(out, tmp_path, MASK_RCNN)


def test_what_is_left_out_of_coco_is_named(tool, tmp_path, coco, capsys):
    def spoil(content):
        content['annotations'][0]['bbox'] = [5, 6, 0, 10]
        extra = content['annotations'][1]
        content['annotations'].append(dict(extra, id=10, category_id=1))
        content['annotations'].append(dict(extra, id=11, image_id=99))
        content['annotations'].append(dict(extra, id=12, bbox=[100, 100, 5, 5]))
        content['annotations'].append(dict(extra, id=13, bbox=[3.5, 3, 20, None]))
        content['annotations'].append(dict(extra, id=14, bbox=['3', '3', '20', '20']))
        content['annotations'].append(dict(extra, id=15, bbox=[3, 3, float('nan'), 20]))
        content['annotations'].append(dict(extra, id=16, bbox=None))
        content['annotations'] += [None, [16, 17]]
        content['images'].append(dict(id=50, file_name='none.jpg', width=SIZE, height=SIZE))
        content['images'][2]['width'] = 99

    edit(coco / 'annotations/instances_train.json', spoil)
    (coco / 'train/3.jpg').write_bytes((coco / 'train/3.jpg').read_bytes()[:500])
    cfg = new(tool, coco, tmp_path / 'config.py', 'detection')
    told = capsys.readouterr().out
    for reason in (
        '2 objects without an area in the image: annotation 1, annotation 12',
        '4 objects without a box of four numbers: annotation 13, annotation 14, annotation 15, '
        'annotation 16',
        '2 objects that are no dict: annotations[11], annotations[12]',
        '1 objects of an unknown category: annotation 10',
        '1 objects in no image: annotation 11',
        '1 images that are not there: train/none.jpg',
        '1 images of another size than the COCO file says: train/2.jpg',
        '1 broken images',
    ):
        assert f'left out: {reason}' in told
    content = json.loads(Path(cfg.train_dataloader.dataset.ann_file).read_text())
    assert [item['id'] for item in content['images']] == [0, 1]
    assert [item['id'] for item in content['annotations']] == [2]


def break_all(data):
    for path in data.glob('images/*'):
        path.write_bytes(b'no image')


def fill_all(data):
    for path in data.glob('masks/*'):
        save(path, label_map((0,)))


MISTAKES = {
    'no folder': (lambda data: shutil.rmtree(data), [], 'data must be a folder'),
    'no images': (lambda data: shutil.rmtree(data / 'images'), [], 'no images among the 6'),
    'no masks': (lambda data: shutil.rmtree(data / 'masks'), [], 'no masks among the 6'),
    'nothing': (
        lambda data: [shutil.rmtree(data / name) for name in ('images', 'masks')],
        [],
        'no images in',
    ),
    'broken': (break_all, [], 'no image with a mask can be used: left out: 6 broken images'),
    'names': (lambda data: None, ['--classes', 'a'], 'must name each of 2 classes, got 1'),
    'two masks': (
        lambda data: shutil.copytree(data / 'masks', data / 'labels'),
        [],
        'may be the masks of one image',
    ),
    'in the data': (lambda data: None, ['--out', '{data}/x.py'], 'out must not be in the folder'),
    'other names': (
        lambda data: [p.rename(p.with_stem(f'm{p.stem}')) for p in data.glob('masks/*')],
        [],
        'no image has a mask of the same name',
    ),
    'one image': (
        lambda data: [p.unlink() for p in data.glob('*/[1-5].png')],
        [],
        'an image with a mask for training and another for validation, got 0 and 1',
    ),
    'no config': (lambda data: None, ['--out', 'x.txt'], 'out must be the name of a config'),
    'one value': (fill_all, [], 'masks must have two values or more that count, got 0'),
    'no COCO file': (lambda data: None, ['--task', 'detection'], 'no COCO file'),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(tool, tmp_path, capsys, name):
    spoil, options, expected = MISTAKES[name]
    make_pairs(tmp_path / 'data')
    spoil(tmp_path / 'data')
    options = [option.format(data=tmp_path / 'data') for option in options]
    with pytest.raises(SystemExit) as error:
        new(tool, tmp_path / 'data', tmp_path / 'out/config.py', 'segmentation', *options)
    message = str(error.value)
    assert expected in message and '\n' not in message
    assert not (tmp_path / 'out').exists()


def test_files_that_exist_are_kept(tool, tmp_path):
    make_pairs(tmp_path / 'data')
    listed = tmp_path / 'config_val.txt'
    listed.write_text('mine')
    with pytest.raises(SystemExit, match='exists: choose another name'):
        new(tool, tmp_path / 'data', tmp_path / 'config.py')
    assert listed.read_text() == 'mine' and not (tmp_path / 'config.py').exists()
    new(tool, tmp_path / 'data', tmp_path / 'config.py', 'segmentation', '--force')
    assert listed.read_text() != 'mine'


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason='needs the real data sets')
@pytest.mark.parametrize(
    ('name', 'task', 'classes'),
    [('camvid', 'segmentation', 11), ('nuclei', 'segmentation', 2), ('nuclei', 'detection', 1)],
)
def test_real_data(tool, tmp_path, name, task, classes):
    out = tmp_path / 'config.py'
    cfg = new(tool, REAL / name, out, task)
    assert len(cfg.metainfo.classes) == classes
    assert sorted(path.name for path in tmp_path.iterdir()) == ['config.py']
    assert cfg.train_dataloader.dataset.data_root == str(REAL / name)


@pytest.mark.long
def test_from_another_folder(tmp_path):
    """As a command, with the name of the folder for the config."""
    make_pairs(tmp_path / 'my data')
    command = [sys.executable, '-m', 'saga_mm', 'new', '--task', 'segmentation', '--data']
    subprocess.run([*command, 'my data'], cwd=tmp_path, check=True, env=os.environ)
    assert (tmp_path / 'my_data.py').is_file()


def commands_of_the_page():
    text = (ROOT / 'docs/own_data.md').read_text().replace('\\\n', '')
    pattern = r'```bash\npython -m saga_mm new ([^\n]+)\n```\s+```\n(.*?)```'
    return re.findall(pattern, text, re.DOTALL)


@pytest.mark.long
@pytest.mark.skipif(not REAL.is_dir(), reason='needs the real data sets')
@pytest.mark.parametrize(('command', 'output'), commands_of_the_page())
def test_the_page_shows_what_the_command_prints(
    tool, tmp_path, capsys, monkeypatch, command, output
):
    """Paste what the command prints into the page if this fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').symlink_to(REAL)
    tool('new').main(shlex.split(command))
    assert capsys.readouterr().out == output


def test_the_page_has_commands():
    assert len(commands_of_the_page()) == 3
