import shutil
from pathlib import Path

import pytest
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset, CityscapesDataset

from saga_mm.cli import check_data


@pytest.fixture
def root(tmp_path):
    for split in ('train', 'val'):
        for folder in ('images', 'labels'):
            (tmp_path / folder / split).mkdir(parents=True)
            (tmp_path / folder / split / 'a.png').touch()
        (tmp_path / f'{split}.json').write_text('{}')
    return tmp_path


def segmentation(root, split):
    return dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
        img_suffix='.png',
    )


def detection(root, split):
    return dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file=f'{split}.json',
        data_prefix=dict(img=f'images/{split}/'),
    )


def config(train, val=None):
    return Config(
        dict(train_dataloader=dict(dataset=train), val_dataloader=val and dict(dataset=val))
    )


def message(cfg, splits=('train', 'val')):
    with pytest.raises(FileNotFoundError) as error:
        check_data(cfg, splits)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('dataset', [segmentation, detection])
def test_what_is_there_passes(root, dataset):
    check_data(config(dataset(root, 'train'), dataset(root, 'val')), ('train', 'val', 'test'))


def test_layout_is_told(tmp_path):
    root = tmp_path / 'none'
    text = message(config(segmentation(root, 'train'), segmentation(root, 'val')))
    assert text == (
        f'no data for BaseSegDataset: the folder {root} is missing. {root} must hold '
        'images/train/*.png, labels/train/*.png, images/val/*.png, labels/val/*.png: put the data '
        'set there, or name its folder by --cfg-options '
        'train_dataloader.dataset.data_root=FOLDER. The demo needs no data: python -m saga_mm demo'
    )
    text = message(config(detection(root, 'train'), detection(root, 'val')))
    assert 'must hold images/train, train.json, images/val, val.json:' in text


def test_environment_variable_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv('DATA_ROOT', raising=False)
    path = tmp_path / 'config.py'
    path.write_text(
        "root = '{{$DATA_ROOT:nowhere}}'\n"
        "train_dataloader = dict(dataset=dict(type='A', data_root=root, ann_file='a.json'))\n"
    )
    assert 'name its folder by the environment variable DATA_ROOT.' in message(
        Config.fromfile(path)
    )


def test_parts_that_are_missing(root):
    cfg = config(segmentation(root, 'train'), detection(root, 'val'))
    (root / 'val.json').unlink()
    assert f'no data for CocoDataset: {root}/val.json is missing' in message(cfg)
    (root / 'val.json').touch()
    assert f'{root}/val.json is empty' in message(cfg)
    check_data(cfg, ['train'])
    (root / 'labels/train/a.png').unlink()
    assert f'the folder {root}/labels/train is empty' in message(cfg)
    (root / 'labels/train/a.jpg').touch()
    assert f'the folder {root}/labels/train has no *.png' in message(cfg)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
        lambda dataset: dict(type='ConcatDataset', datasets=[dict(type='A'), dataset]),
        lambda dataset: dict(
            type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[dataset])
        ),
    ],
)
def test_wrappers_are_looked_into(root, wrap):
    check_data(config(wrap(detection(root, 'train'))), ['train'])
    (root / 'train.json').unlink()
    assert 'train.json is missing' in message(config(wrap(detection(root, 'train'))), ['train'])


def test_what_names_no_files_is_left_alone(tmp_path):
    missing = str(tmp_path / 'none')
    check_data(
        config(
            dict(type='saga_mm.ScenesSegDataset', data_root=missing, split='train'),
            dict(detection(missing, 'val'), backend_args=dict(backend='petrel')),
        ),
        ('train', 'val', 'test'),
    )


class TiffDataset(BaseSegDataset):
    """A user's class with suffixes of its own."""

    def __init__(self, **options):
        super().__init__(img_suffix='.tif', seg_map_suffix='_mask.gif', **options)


class ListDataset(BaseSegDataset):
    """A user's class that finds its files in another way."""

    def load_data_list(self):
        return [dict(img_path='somewhere')]


class FetchDataset(BaseSegDataset):
    """A user's class that downloads its data first."""

    def __init__(self, **options):
        super().__init__(**options)
        for key, suffix in (('img_path', '.jpg'), ('seg_map_path', '.png')):
            write(self.data_prefix[key], f'a{suffix}')


def write(folder, *names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'a')


PREFIXES = dict(img_path='images', seg_map_path='labels')
# A class, the image that it reads, and the label map.
CLASSES = {
    'name': ('CityscapesDataset', '_leftImg8bit.png', '_gtFine_labelTrainIds.png'),
    'scope': ('mmseg.CityscapesDataset', '_leftImg8bit.png', '_gtFine_labelTrainIds.png'),
    'class': (CityscapesDataset, '_leftImg8bit.png', '_gtFine_labelTrainIds.png'),
    # This class reads its folder when it is built.
    'asserts': ('STAREDataset', '.png', '.ah.png'),
    'own': (TiffDataset, '.tif', '_mask.gif'),
}


@pytest.mark.parametrize('name', CLASSES)
@pytest.mark.parametrize('scope', [None, 'mmseg'])
def test_suffixes_are_those_of_the_class(tmp_path, name, scope):
    kind, image, labels = CLASSES[name]
    dataset = dict(type=kind, data_root=str(tmp_path), data_prefix=PREFIXES)
    cfg = Config(dict(default_scope=scope, train_dataloader=dict(dataset=dataset)))
    for there in ('images', 'labels'):
        write(tmp_path / there, 'a.dat')
    assert f'has no *{image}.' in message(cfg)
    write(tmp_path / 'images/sub', f'a{image}')
    assert f'has no *{labels}.' in message(cfg)
    write(tmp_path / 'labels/sub', f'a{labels}')
    check_data(cfg, ['train'])


@pytest.mark.parametrize('kind', [ListDataset, FetchDataset])
def test_classes_with_other_ways_are_left_alone(tmp_path, kind):
    dataset = dict(type=kind, data_root=str(tmp_path / 'none'), data_prefix=PREFIXES)
    check_data(config(dataset), ['train'])


def test_links_are_followed(root):
    for folder in ('images', 'labels'):
        (root / folder / 'train').rename(root / f'{folder}_elsewhere')
        (root / folder / 'train').mkdir()
        (root / folder / 'train/link').symlink_to(root / f'{folder}_elsewhere')
    check_data(config(segmentation(root, 'train')), ['train'])


LOADING = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]


@pytest.mark.parametrize(
    ('pipeline', 'reads'),
    [
        (LOADING, False),
        ([*LOADING, dict(type='LoadAnnotations')], True),
        ([dict(type='TestTimeAug', transforms=[[dict(type='mmseg.LoadAnnotations')]])], True),
        ([*LOADING, dict(type='mmdet.LoadAnnotations', with_bbox=True)], False),
        ([*LOADING, dict(type='mmdet.LoadAnnotations', with_seg=True)], True),
    ],
)
def test_label_maps_are_looked_for_where_they_are_read(root, pipeline, reads):
    shutil.rmtree(root / 'labels')
    dataset = dict(segmentation(root, 'train'), pipeline=pipeline)
    if reads:
        assert f'{root}/labels/train is missing' in message(config(dataset))
    else:
        check_data(config(dataset), ['train'])


def test_a_root_that_nothing_lies_under_may_be_missing(root):
    dataset = segmentation(root, 'train')
    dataset['data_prefix'] = {k: str(root / path) for k, path in dataset['data_prefix'].items()}
    check_data(config(dict(dataset, data_root='/nowhere')), ['train'])


def test_the_option_is_that_of_the_data_set_in_its_wrappers(root):
    (root / 'train.json').unlink()
    inner = dict(type='ConcatDataset', datasets=[dict(type='A'), detection(root, 'train')])
    text = message(config(dict(type='RepeatDataset', times=2, dataset=inner)))
    assert '--cfg-options train_dataloader.dataset.dataset.datasets.1.data_root=FOLDER' in text


def test_remote_data_is_left_alone(tmp_path):
    remote = dict(detection('s3://bucket/data', 'train'))
    check_data(config(remote), ['train'])
    remote = dict(
        detection('', 'train'), ann_file='http://a/b.json', data_prefix=dict(img='s3://a')
    )
    check_data(config(remote), ['train'])
