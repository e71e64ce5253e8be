"""The layout of a generated folder: file names, categories, and the appearance of each category."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .kinds import KINDS, Kind, derived_kinds

SPLITS = ('train', 'val')
CLASSES = tuple(KINDS)
PALETTE = (
    [(220, 20, 60), (255, 140, 0), (255, 255, 0), (50, 205, 50), (0, 206, 209)]
    + [(30, 144, 255), (138, 43, 226), (255, 105, 180), (139, 69, 19), (245, 245, 245)]
)  # fmt: skip
# The numbers from 1 to 90 that COCO does not use for its 80 categories.
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}


@dataclass(frozen=True)
class Layout:
    """File names and categories of a folder.

    File names are templates for `split` ('train' or 'val'), `phase` ('training' or 'validation')
    and, for images and labels, `number` (from 1 in each split).

    Args:
        image: the template of the images' names.
        labels: of the label PNGs, or None for none. Value 0 is background, i is the i-th category.
        instances: of the COCO files, or None for none.
        kinds: what the categories look like.
        categories: gives (id, name) of each category, for the COCO files.
        train, val: how many images by default.
        size: (H, W) by default.
    """

    image: str
    labels: str | None
    instances: str | None
    kinds: tuple[Kind, ...]
    categories: Callable[[], list[tuple[int, str]]]
    train: int
    val: int
    size: tuple[int, int]

    def name(self, template: str, split: str, number: int = 0) -> str:
        """A file name, relative to the folder."""
        phase = {'train': 'training', 'val': 'validation'}[split]
        return template.format(split=split, phase=phase, number=number)


def _scenes_categories():
    return list(enumerate(CLASSES, start=1))


def _coco_categories():
    try:
        from mmdet.datasets import CocoDataset
    except ImportError as error:
        raise RuntimeError(
            'the names of the COCO categories come from mmdet, which cannot be imported '
            f'({error}): install mmdet, or choose another layout'
        ) from error
    ids = [i for i in range(1, 91) if i not in _COCO_UNUSED_IDS]
    return list(zip(ids, CocoDataset.METAINFO['classes'], strict=True))


def _no_categories():
    return []


LAYOUTS = dict(
    scenes=Layout(
        image='images/{split}/{number:05d}.jpg',
        labels='annotations/{split}/{number:05d}.png',
        instances='instances_{split}.json',
        kinds=tuple(KINDS.values()),
        categories=_scenes_categories,
        train=400,
        val=100,
        size=(192, 256),
    ),
    coco=Layout(
        image='{split}2017/{number:012d}.jpg',
        labels=None,
        instances='annotations/instances_{split}2017.json',
        kinds=tuple(derived_kinds(80)),
        categories=_coco_categories,
        train=80,
        val=20,
        size=(480, 640),
    ),
    ade20k=Layout(
        image='images/{phase}/ADE_{split}_{number:08d}.jpg',
        labels='annotations/{phase}/ADE_{split}_{number:08d}.png',
        instances=None,
        kinds=tuple(derived_kinds(150)),
        categories=_no_categories,
        train=80,
        val=20,
        size=(512, 683),
    ),
)
