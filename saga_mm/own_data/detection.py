"""Surveys COCO files and their images."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .coco import check_coco, find_coco, find_folder, select_images
from .config import beside, detection_config
from .files import divide, split_of
from .images import Loading, Look, choose_loading, look_at_image
from .labels import distinct_colors
from .survey import Survey, look_at_all, tell_images, tell_problems, tell_table, title_of


@dataclass
class Split:
    """The COCO file of a split, what it holds, and the folder of its images."""

    path: Path
    content: dict
    folder: PurePosixPath
    # whether something was left out
    is_changed: bool = False


def survey_detection(root: Path, stem: str) -> Survey:
    """Look at COCO files and their images, and write a config for them.

    Args:
        root: The folder of the data.
        stem: The name of the config, with which the names of the files beside it begin.

    Raises:
        ValueError: There is nothing that can be trained on. One line.
    """
    problems: dict[str, list[str]] = defaultdict(list)
    splits = {name: _read(root, path, problems) for name, path in _choose(root).items()}
    categories = [
        [(item['id'], item['name']) for item in split.content['categories']]
        for split in splits.values()
    ]
    if any(other != categories[0] for other in categories):
        raise ValueError(f'the COCO files must have the same categories, got {categories}')
    looks: dict[str, Look] = {}
    for split in splits.values():
        looks |= _look_at_images(root, split, problems)
    if not looks:
        raise ValueError(f'no image can be used: {"; ".join(tell_problems(problems))}')
    loading = _choose_loading(splits, looks, problems)
    was_split = len(splits) > 1
    if not was_split:
        splits = _divide(*splits.values())
    for name, split in splits.items():
        if not split.content['annotations']:
            reasons = '; '.join(['got none', *tell_problems(problems)])
            raise ValueError(f'there must be objects for {name}, {reasons}')
    return _describe(root, stem, splits, was_split, looks, loading, problems)


def _choose(root: Path) -> dict[str, Path]:
    """The COCO files for training and validation, or one for both."""
    found = find_coco(root)
    train = found.get('train') or found.get('all')
    val = found.get('val') or found.get('test')
    if train is None or val is None:
        return dict(train=train or val or next(iter(found.values())))
    return dict(train=train, val=val)


def _read(root: Path, path: Path, problems: dict[str, list[str]]) -> Split:
    content = json.loads(path.read_bytes())
    try:
        checked = check_coco(content, problems)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    names = [item['file_name'] for item in checked['images']]
    if not names:
        raise ValueError(f'{path} lists no images')
    changed = checked != content
    split = split_of(PurePosixPath(path.relative_to(root).as_posix()), stem=True)
    return Split(path, checked, find_folder(root, names, split), changed)


def _look_at_images(root: Path, split: Split, problems: dict[str, list[str]]) -> dict[str, Look]:
    """What images hold, by their path; those that can't be trained on are left out."""
    found = {}
    kept = []

    def look(item: dict) -> Look | str:
        path = root / split.folder / item['file_name']
        if not path.is_file():
            return 'images that are not there'
        try:
            return look_at_image(path)
        except ValueError as error:
            return f'broken images ({error})'

    images = split.content['images']
    for item, result in zip(images, look_at_all(look, images), strict=True):
        name = (split.folder / item['file_name']).as_posix()
        if isinstance(result, str):
            problems[result].append(name)
            continue
        size = dict(height=result.height, width=result.width)
        if size != {key: item.get(key, size[key]) for key in size}:
            problems['images of another size than the COCO file says'].append(name)
            continue
        split.is_changed |= not size.keys() <= item.keys()
        kept.append(item | size)
        found[name] = result
    _keep(split, kept)
    return found


def _keep(split: Split, images: list[dict]) -> None:
    split.is_changed |= len(images) < len(split.content['images'])
    split.content = select_images(split.content, images)


def _choose_loading(
    splits: dict[str, Split], looks: dict[str, Look], problems: dict[str, list[str]]
) -> Loading:
    """Choose how images are loaded; those that can't be are left out."""
    left: dict[str, list[str]] = defaultdict(list)
    loading = choose_loading(looks, left)
    dropped = {name for names in left.values() for name in names}
    problems.update(left)
    for name in dropped:
        del looks[name]
    for split in splits.values():
        images = split.content['images']
        _keep(split, [i for i in images if (split.folder / i['file_name']).as_posix() in looks])
    return loading


def _divide(split: Split) -> dict[str, Split]:
    images = split.content['images']
    if len(images) < 2:
        raise ValueError(
            'there must be an image for training and another for validation, got one image'
        )
    return {
        name: Split(split.path, select_images(split.content, part), split.folder, True)
        for name, part in zip(('train', 'val'), divide(images), strict=True)
    }


def _describe(
    root: Path,
    stem: str,
    splits: dict[str, Split],
    was_split: bool,
    looks: dict[str, Look],
    loading: Loading,
    problems: dict[str, list[str]],
) -> Survey:
    """The survey, with its config and the COCO files that go beside it."""
    objects = [item for split in splits.values() for item in split.content['annotations']]
    names = [item['name'] for item in splits['train'].content['categories']]
    with_masks = all(item.get('segmentation') for item in objects)
    sizes = np.sqrt([item['bbox'][2] * item['bbox'][3] for item in objects])
    files, written = {}, {}
    for name, split in splits.items():
        path = repr(split.path.relative_to(root).as_posix())
        if split.is_changed:
            path = beside(f'{stem}_{name}.json')
            written[f'{stem}_{name}.json'] = json.dumps(split.content).encode()
        files[name] = path, f'{split.folder.as_posix()}/'
    model = 'Mask R-CNN' if with_masks else 'RetinaNet'
    config = detection_config(
        f'{model}, SAGA-T, from scratch, on {title_of(root)}: batch 4 x 1 CPU or GPU.',
        root,
        files,
        loading,
        names,
        distinct_colors(len(names)),
        np.array([(look.height, look.width) for look in looks.values()]),
        sizes,
        with_masks,
    )
    lines = _tell_files(root, splits, was_split)
    lines += [*tell_images(looks.values(), loading), '', *_tell_objects(splits, names)]
    masks = 'all have a mask' if with_masks else 'not all have a mask, so boxes are trained'
    lines.append(f'sides of objects: median {np.median(sizes):.3g} pixels; {masks}')
    return Survey('\n'.join([*lines, *tell_problems(problems)]), config, written)


def _tell_files(root: Path, splits: dict[str, Split], was_split: bool) -> list[str]:
    lines = []
    for name, purpose in (('train', 'training'), ('val', 'validation')):
        split = splits[name]
        with_objects = {item['image_id'] for item in split.content['annotations']}
        empty = len(split.content['images']) - len(with_objects)
        without = f', {empty} of them without an object' if empty else ''
        lines.append(
            f'{len(split.content["images"])} images for {purpose}{without}: '
            f'{split.path.relative_to(root)} with {split.folder.as_posix()}/'
        )
    if not was_split:
        lines.append('there was no split: one image of five, at random, is for validation')
    return lines


def _tell_objects(splits: dict[str, Split], names: list[str]) -> list[str]:
    counts = {
        name: Counter(item['category_id'] for item in split.content['annotations'])
        for name, split in splits.items()
    }
    rows: list[tuple] = [('id', 'class', 'train', 'val')]
    for item in splits['train'].content['categories']:
        number = item['id']
        rows.append((number, item['name'], counts['train'][number], counts['val'][number]))
    return tell_table(rows)
