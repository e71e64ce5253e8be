import pytest
from mmengine.config import Config

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
        'train_dataloader.dataset.data_root=FOLDER. The demo needs no data: make demo'
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
