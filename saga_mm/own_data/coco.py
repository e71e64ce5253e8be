"""Finds COCO files and their images, and checks them."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ..apis.images import IMAGE_SUFFIXES
from .files import is_of_masks, list_files, split_of

KEYS = ('images', 'annotations', 'categories')


def find_coco(root: Path) -> dict[str, Path]:
    """The COCO files of a folder, by split; 'all' for one whose name tells none.

    Raises:
        ValueError: There is none, or there are two of a split.
    """
    found: dict[str, Path] = {}
    for name in list_files(root, {'.json'}):
        if not is_coco(root / name):
            continue
        split = split_of(name, stem=True) or 'all'
        other = found.setdefault(split, root / name)
        if other != root / name:
            raise ValueError(
                f'{other.relative_to(root)} and {name} may both be for {split}: give a folder '
                'with one of them'
            )
    if not found:
        raise ValueError(f'no COCO file (JSON with {", ".join(KEYS)}) in {root}')
    return found


def is_coco(path: Path) -> bool:
    """Whether a file is JSON with the entries of a COCO file for detection."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in KEYS)


def find_folder(root: Path, names: Sequence[str], split: str | None) -> PurePosixPath:
    """The folder, relative to `root`, below which the images of a COCO file are.

    Where several splits have images of the same names, it is that of the split.

    Raises:
        ValueError: There are none of them.
    """
    paths = set(list_files(root, IMAGE_SUFFIXES))
    by_name = defaultdict(list)
    for path in paths:
        by_name[path.name].append(path)
    folders = set()
    for name in map(PurePosixPath, names):
        depth = len(name.parts)
        found = [path for path in by_name[name.name] if path.parts[-depth:] == name.parts]
        folders |= {PurePosixPath(*path.parts[:-depth]) for path in found}
    if not folders:
        raise ValueError(f'{root} has none of the images of the COCO file, such as {names[0]}')

    def rank(folder: PurePosixPath) -> tuple[bool, bool, int, bool, int]:
        own = split_of(folder / 'image')
        number = sum(folder / name in paths for name in names)
        # masks may have the names of the images
        fits = not is_of_masks(folder), own in (None, split)
        return *fits, number, own == split, -len(folder.parts)

    return max(sorted(folders), key=rank)


def check_coco(content: dict, problems: dict[str, list[str]]) -> dict:
    """A copy of a COCO file without what can't be trained on, which is added to `problems`.

    Objects without an area, or without a number of their own, get one. A width or height of an
    image that is no number is left out.

    Raises:
        ValueError: Its categories are not a list of different names, or its images have no names,
            or not different ids.
    """
    for key in ('categories', 'images'):
        for item in content[key]:
            if not isinstance(item, dict):
                raise ValueError(f'{key} must be dicts, got {item!r}')
    categories = [(item.get('id'), item.get('name')) for item in content['categories']]
    different = [len(set(values)) for values in zip(*categories, strict=True)]
    if not categories or min(different) < len(categories):
        raise ValueError(f'categories must have different ids and names, got {categories[:5]}')
    if not all(isinstance(name, str) for _, name in categories):
        raise ValueError(f'categories must have names, got {categories[:5]}')
    for item in content['images']:
        if not isinstance(item.get('file_name'), str) or 'id' not in item:
            raise ValueError(f'images must have a file_name and an id, got {item}')
    images = {item['id']: _without_bad_size(item) for item in content['images']}
    if len(images) < len(content['images']):
        raise ValueError('images must have different ids')
    known = {number for number, _ in categories}
    kept = []
    for i, item in enumerate(content['annotations']):
        if not isinstance(item, dict):
            problems['objects that are no dict'].append(f'annotations[{i}]')
        elif reason := _problem(item, images, known):
            problems[reason].append(f'annotation {item.get("id")}')
        else:
            box, area = item['bbox'], item.get('area')
            # a null ends a training, or the evaluation after it
            given = area if _is_number(area) else box[2] * box[3]
            kept.append(item | dict(area=given, iscrowd=item.get('iscrowd') or 0))
    numbers = {item.get('id') for item in kept}
    # pycocotools takes an object 0 for none
    if len(numbers) < len(kept) or numbers & {0, None}:
        kept = [item | dict(id=number) for number, item in enumerate(kept, 1)]
    return dict(content, images=list(images.values()), annotations=kept)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _without_bad_size(image: dict) -> dict:
    return {k: v for k, v in image.items() if k not in ('width', 'height') or _is_number(v)}


def _problem(item: dict, images: dict, known: set) -> str | None:
    """Why an object can't be trained on."""
    box = item.get('bbox')
    if item.get('category_id') not in known:
        return 'objects of an unknown category'
    if item.get('image_id') not in images:
        return 'objects in no image'
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return 'objects without a box of four numbers'
    image = images[item['image_id']]
    width = min(box[0] + box[2], image.get('width', np.inf)) - max(box[0], 0)
    height = min(box[1] + box[3], image.get('height', np.inf)) - max(box[1], 0)
    return 'objects without an area in the image' if min(width, height) <= 0 else None


def select_images(content: dict, images: Sequence[dict]) -> dict:
    """A COCO file with some of its images, and their objects."""
    chosen = {item['id'] for item in images}
    objects = [item for item in content['annotations'] if item['image_id'] in chosen]
    return dict(content, images=list(images), annotations=objects)
