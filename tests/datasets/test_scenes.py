"""The generator: what it draws, and that a folder is complete or absent."""

import importlib.util
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from saga_mm.datasets.scenes import CLASSES, LAYOUTS, PALETTE, make_scenes, writing
from saga_mm.datasets.scenes.kinds import derived_kinds
from saga_mm.datasets.scenes.layouts import SPLITS
from saga_mm.datasets.scenes.polygons import polygons
from saga_mm.datasets.scenes.render import deal, render

SMALL = dict(train=6, val=4, size=(64, 80), progress=False)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp('made') / 'scenes', **SMALL)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def decode(annotation, height, width):
    mask_utils = pytest.importorskip('pycocotools.mask')
    parts = mask_utils.frPyObjects(annotation['segmentation'], height, width)
    return mask_utils.decode(mask_utils.merge(parts)).astype(bool)


def test_same_seed_same_bytes(scenes, tmp_path):
    again = make_scenes(tmp_path / 'again', **SMALL)
    assert contents(again) == contents(scenes)
    assert len(contents(scenes)) == 2 * (6 + 4) + 2 + 1


def test_another_seed_another_set(scenes, tmp_path):
    other = contents(make_scenes(tmp_path / 'other', **SMALL, seed=1))
    first = contents(scenes)
    assert other.keys() == first.keys()
    assert not [name for name in first if other[name] == first[name]]


def test_all_scenes_differ(scenes):
    images = [data for name, data in contents(scenes).items() if name.endswith('.jpg')]
    assert len(set(images)) == 6 + 4


def test_splits_share_no_part_of_a_photograph():
    from saga_mm.datasets.scenes.photos import CUTS, REGIONS

    for regions in (REGIONS, *(cut[1] for cut in CUTS.values())):
        assert regions['train'][2] < regions['val'][0]


@pytest.mark.parametrize('split', SPLITS)
def test_labels_are_the_union_of_the_instances(scenes, split):
    coco = json.loads((scenes / f'instances_{split}.json').read_text())
    assert [c['name'] for c in coco['categories']] == list(CLASSES)
    assert len({a['id'] for a in coco['annotations']}) == len(coco['annotations'])
    for image in coco['images']:
        labels = cv2.imread(
            str(scenes / f'annotations/{split}/{image["id"]:05d}.png'), cv2.IMREAD_UNCHANGED
        )
        assert labels.shape == (image['height'], image['width']) == (64, 80)
        assert cv2.imread(str(scenes / f'images/{split}' / image['file_name'])).shape[:2] == (
            64,
            80,
        )
        union = np.zeros_like(labels)
        for annotation in coco['annotations']:
            if annotation['image_id'] != image['id']:
                continue
            mask = decode(annotation, 64, 80)
            assert not union[mask].any(), 'instances overlap'
            union[mask] = annotation['category_id']
            rows, columns = np.nonzero(mask)
            x, y, w, h = annotation['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)
            assert annotation['area'] == mask.sum() >= 0.001 * mask.size
            assert annotation['iscrowd'] == 0
        np.testing.assert_array_equal(labels, union)


def test_polygons_rasterise_to_the_mask():
    rng = np.random.default_rng(0)
    for i in range(60):
        field = rng.random(rng.integers(3, 40, 2)).astype(np.float32)
        mask = (cv2.GaussianBlur(field, (0, 0), 1.5) if i % 2 else field) > 0.5
        if mask.any():
            outlines = dict(segmentation=polygons(mask))
            assert all(len(outline) >= 8 for outline in outlines['segmentation'])
            np.testing.assert_array_equal(decode(outlines, *mask.shape), mask)


def test_a_hole_stays_a_hole():
    mask = np.ones((9, 11), dtype=bool)
    mask[3:6, 4:8] = False
    outlines = polygons(mask)
    assert len(outlines) == 2
    np.testing.assert_array_equal(decode(dict(segmentation=outlines), 9, 11), mask)


def test_classes():
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == len(set(CLASSES)) >= 8
    assert (0, 0, 0) not in PALETTE


def test_every_class_is_about_as_frequent():
    hands = deal(50, 10, np.random.default_rng(0))
    counts = Counter(kind for hand in hands for kind in hand)
    assert len(hands) == 50 and set(counts) == set(range(10))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_every_class_is_seen(scenes):
    coco = json.loads((scenes / 'instances_train.json').read_text())
    assert {a['category_id'] for a in coco['annotations']} == set(range(1, len(CLASSES) + 1))


@pytest.mark.parametrize('n', [80, 150])
def test_derived_kinds_look_different(n):
    looks = {(k.shape, k.surface, k.hue) for k in derived_kinds(n)}
    assert len(looks) == n


def test_every_kind_can_be_drawn():
    kinds = [kind for layout in LAYOUTS.values() for kind in layout.kinds]
    for i in range(len(kinds)):
        scene = render(kinds, [i], 'val', (96, 64), np.random.default_rng(i))
        assert scene.image.shape == (96, 64, 3) and scene.image.dtype == np.uint8
        assert scene.image.std() > 1
        for mask, label in zip(scene.masks, scene.labels, strict=True):
            assert label == i and 0 < mask.sum() < mask.size


def test_front_objects_hide_those_behind():
    kinds = LAYOUTS['scenes'].kinds
    labels = [0, 1, 2, 3] * 12
    scene = render(kinds, labels, 'train', (64, 64), np.random.default_rng(0))
    assert np.sum(scene.masks, axis=0).max() == 1
    assert len(scene.masks) < len(labels), 'crowded: some objects must be hidden and dropped'


def test_a_complete_folder_is_reused(scenes, monkeypatch):
    before = contents(scenes)
    monkeypatch.setattr(writing, 'render', None)
    assert make_scenes(scenes, **SMALL) == scenes
    assert contents(scenes) == before


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / 'empty'
    out.mkdir()
    make_scenes(out, **SMALL)
    assert (out / 'scenes.json').is_file()


def test_other_parameters_are_refused(scenes):
    with pytest.raises(ValueError, match=r'made with train=6, seed=0 instead of train=7, seed=3'):
        make_scenes(scenes, **SMALL | dict(train=7), seed=3)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='not made by this generator'):
        make_scenes(tmp_path, **SMALL)
    assert (tmp_path / 'thesis.txt').read_text() == 'precious'


def test_a_damaged_folder_is_named(tmp_path):
    out = make_scenes(tmp_path / 'scenes', **SMALL)
    (out / 'annotations/val/00003.png').unlink()
    with pytest.raises(ValueError, match=r'incomplete, annotations/val/00003.png is missing'):
        make_scenes(out, **SMALL)


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError(28, 'No space left on device')])
def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, error):
    drawn = []

    def interrupted(*args):
        drawn.append(1)
        if len(drawn) == 8:  # It stops in the middle of val.
            raise error
        return render(*args)

    monkeypatch.setattr(writing, 'render', interrupted)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        make_scenes(tmp_path / 'scenes', **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_kill_leaves_no_folder(tmp_path, scenes):
    out = tmp_path / 'scenes'
    context = multiprocessing.get_context('spawn')
    process = context.Process(target=make_scenes, args=(out,), kwargs=SMALL | dict(train=5000))
    process.start()
    while not list(tmp_path.rglob('00005.jpg')):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not out.exists()
    assert contents(make_scenes(out, **SMALL)) == contents(scenes)


def test_two_processes_at_once(tmp_path, scenes):
    out = tmp_path / 'scenes'
    context = multiprocessing.get_context('spawn')
    processes = [context.Process(target=make_scenes, args=(out,), kwargs=SMALL) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == [out]
    assert contents(out) == contents(scenes)


@pytest.mark.parametrize('winner', [{}, dict(seed=5)])
def test_the_slower_of_two_uses_what_the_faster_made(tmp_path, monkeypatch, winner):
    """Another process finishes the folder between this one's check and its rename."""
    out = tmp_path / 'scenes'
    write_split = writing._write_split

    def overtaken(*args):
        monkeypatch.setattr(writing, '_write_split', write_split)
        make_scenes(out, **SMALL, **winner)
        write_split(*args)

    monkeypatch.setattr(writing, '_write_split', overtaken)
    if winner:
        with pytest.raises(ValueError, match='made with seed=5 instead of seed=0'):
            make_scenes(out, **SMALL)
    else:
        assert make_scenes(out, **SMALL) == out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(layout='voc'), "layout: expected one of scenes, coco, ade20k, got 'voc'"),
        (dict(train=-1), 'train: expected an integer from 1 to 999999, got -1'),
        (dict(val=0), 'val: expected an integer from 1'),
        (dict(size=(0, 64)), 'height: expected an integer from 32 to 4096, got 0'),
        (dict(size=(64, 1e9)), 'width: expected an integer'),
        (dict(size=(64, 64, 3)), r'size: expected \(height, width\), got'),
        (dict(size=64), r'size: expected \(height, width\), got 64'),
        (dict(seed=-1), 'seed: expected an integer from 0'),
    ],
)
def test_bad_arguments(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_scenes(tmp_path / 'scenes', **SMALL | wrong)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError):
        make_scenes(tmp_path / 'file' / 'scenes', **SMALL)
    with pytest.raises(ValueError, match='not made by this generator'):
        make_scenes(tmp_path / 'file', **SMALL)


def test_without_scikit_image(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'skimage' else find_spec(name)
    )
    with pytest.raises(RuntimeError, match='pip install scikit-image'):
        make_scenes(tmp_path / 'scenes', **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_relative_path_and_a_link(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'data').symlink_to('disk')
    assert make_scenes('data/scenes', **SMALL) == tmp_path / 'disk/scenes'
    assert Path('data/scenes/scenes.json').is_file()
