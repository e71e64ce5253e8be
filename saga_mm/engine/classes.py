"""The classes of a data set, and what a model and its evaluation make of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence

from mmengine.dataset import BaseDataset
from torch import nn

# bytes of an annotation file that is read once more to explain an error
SMALL = 10**8


def describe_empty(dataset: BaseDataset) -> str:
    """What to say about a data set without an image."""
    names = ('ann_file', 'data_prefix', 'filter_cfg')
    given = ((name, getattr(dataset, name, None)) for name in names)
    told = ', '.join(f'{name}={value!r}' for name, value in given if value)
    return (
        'the data set must have at least one image with labels of its classes, got none from '
        f'{type(dataset).__name__}({told}) for {describe_classes(dataset)}'
    )


def describe_classes(dataset: BaseDataset) -> str:
    """The classes of a data set, and the categories of its annotation file where it has such."""
    told = f'classes={getattr(dataset, "metainfo", {}).get("classes")!r}'
    path = str(getattr(dataset, 'ann_file', ''))
    if not path.endswith('.json') or not os.path.isfile(path) or os.path.getsize(path) > SMALL:
        return told
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (OSError, ValueError):
        return told
    categories = content.get('categories') if isinstance(content, dict) else None
    names = [str(category.get('name')) for category in categories or ()]
    return f'{told}, and the categories of {path} are {_list(names)}' if names else told


def classes_of(dataset: BaseDataset, name: str) -> Sequence[str]:
    """The names of a data set's classes; none if it has no such names.

    Raises:
        ValueError: They are one text, whose letters would be the classes, or none of them is in the
            annotations. It names the data set as `name`.
    """
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    if isinstance(classes, str):
        raise ValueError(
            f'{name}: metainfo.classes must be a tuple of names, got the text {classes!r}: write '
            f'({classes!r},) with a comma'
        )
    for part in parts_of(dataset):
        # of CocoDataset: the categories that are classes
        if classes and getattr(part, 'cat_ids', None) == []:
            raise ValueError(
                f'{name}: no class is a category of the annotations: {describe_classes(part)}'
            )
    return tuple(classes or ())


def parts_of(dataset: BaseDataset) -> Iterator[BaseDataset]:
    """The data sets in wrappers such as ConcatDataset and RepeatDataset."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
        return
    for one in inner:
        yield from parts_of(one)


def fails_for_more_classes(model: nn.Module, metrics: Sequence[object]) -> bool:
    """Whether an evaluation must fail where a detector has more classes than the data set.

    COCO's looks up the category of each prediction. Below a threshold of the score there may be
    none of the other classes.
    """
    looks_up = any(hasattr(metric, 'cat_ids') for metric in metrics)
    return looks_up and not _has_threshold(getattr(model, 'test_cfg', None))


def _has_threshold(cfg: object) -> bool:
    if not isinstance(cfg, Mapping):
        return False
    return (cfg.get('score_thr') or 0) > 0 or any(map(_has_threshold, cfg.values()))


def _list(names: Sequence[str], number: int = 10) -> str:
    return ', '.join(names[:number]) + (f' and {len(names) - number} more' * (len(names) > number))
