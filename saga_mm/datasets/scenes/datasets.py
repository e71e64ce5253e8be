"""The scenes as data sets of mmdet, mmpretrain and mmseg, made on first use.

The registry holds functions that import the toolbox when they are called and return an instance of
its data set class.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.logging import print_log

from ...registry import DATASETS
from .layouts import CLASSES, LAYOUTS, PALETTE, SPLITS
from .writing import VERSION, make_scenes, read_manifest


@DATASETS.register_module(name='ScenesDetDataset')
def scenes_det_dataset(data_root: str = 'data/scenes', split: str = 'train', **kwargs):
    """The scenes for detection and instance segmentation.

    Args:
        data_root (str): Folder in layout 'scenes', of whatever size; where there is none, the
            default one is made there. Defaults to 'data/scenes'.
        split (str): 'train' or 'val'. Defaults to 'train'.
        **kwargs: Options of mmdet's CocoDataset: pipeline, test_mode, filter_cfg, ...

    Returns:
        mmdet.datasets.CocoDataset: A data set with metainfo `classes` and `palette`.
    """
    _provide(data_root, split)
    from mmdet.datasets import CocoDataset

    return CocoDataset(
        data_root=data_root,
        ann_file=LAYOUTS['scenes'].name(LAYOUTS['scenes'].instances or '', split),
        data_prefix=dict(img=f'images/{split}/'),
        metainfo=dict(classes=CLASSES, palette=PALETTE),
        **kwargs,
    )


@DATASETS.register_module(name='ScenesSegDataset')
def scenes_seg_dataset(data_root: str = 'data/scenes', split: str = 'train', **kwargs):
    """The scenes for semantic segmentation; class 0 is 'background'.

    Args:
        data_root (str): Folder in layout 'scenes', of whatever size; where there is none, the
            default one is made there. Defaults to 'data/scenes'.
        split (str): 'train' or 'val'. Defaults to 'train'.
        **kwargs: Options of mmseg's BaseSegDataset: pipeline, test_mode, ...

    Returns:
        mmseg.datasets.BaseSegDataset: A data set with metainfo `classes` and `palette`.
    """
    _provide(data_root, split)
    from mmseg.datasets import BaseSegDataset

    return BaseSegDataset(
        data_root=data_root,
        data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'annotations/{split}'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        reduce_zero_label=False,
        metainfo=dict(classes=('background', *CLASSES), palette=[(0, 0, 0), *PALETTE]),
        **kwargs,
    )


@DATASETS.register_module(name='ScenesClsDataset')
def scenes_cls_dataset(
    data_root: str = 'data/scenes', split: str = 'train', lazy_init: bool = False, **kwargs
):
    """The objects of the scenes for classification: each is a sample, with its box as `bbox`.

    `saga_mm.CropObject` in the pipeline cuts the object out of its scene.

    Args:
        data_root (str): Folder in layout 'scenes', of whatever size; where there is none, the
            default one is made there. Defaults to 'data/scenes'.
        split (str): 'train' or 'val'. Defaults to 'train'.
        lazy_init (bool): Leave it to `full_init` to read the objects. Defaults to False.
        **kwargs: Options of mmpretrain's BaseDataset: pipeline, test_mode, ...

    Returns:
        mmpretrain.datasets.BaseDataset: A data set with metainfo `classes` and `palette`.
    """
    _provide(data_root, split)
    from mmpretrain.datasets import BaseDataset

    dataset = BaseDataset(
        ann_file='',
        data_root=data_root,
        data_prefix=f'images/{split}',
        metainfo=dict(classes=CLASSES, palette=PALETTE),
        lazy_init=True,
        **kwargs,
    )
    dataset.load_data_list = functools.partial(_objects, data_root, split)
    if not lazy_init:
        dataset.full_init()
    return dataset


def _objects(data_root: str, split: str) -> list[dict]:
    """The samples of `ScenesClsDataset`: `bbox` is (x1, y1, x2, y2), in pixels."""
    layout = LAYOUTS['scenes']
    coco = json.loads(Path(data_root, layout.name(layout.instances or '', split)).read_text())
    objects = []
    for annotation in coco['annotations']:
        x, y, width, height = annotation['bbox']
        image = layout.name(layout.image, split, annotation['image_id'])
        objects.append(
            dict(
                img_path=str(Path(data_root, image)),
                gt_label=annotation['category_id'] - 1,
                bbox=[x, y, x + width, y + height],
            )
        )
    return objects


def _provide(data_root: str, split: str) -> None:
    """Make the default scenes if there are no scenes yet."""
    if split not in SPLITS:
        raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
    folder = Path(data_root)
    manifest = read_manifest(folder)
    if manifest is None:
        print_log(f'making scenes in {folder} (once)', 'current')
        make_scenes(folder, progress=is_main_process())
    elif (manifest['layout'], manifest['version']) != ('scenes', VERSION):
        raise ValueError(
            f'{folder} holds layout {manifest["layout"]}, version {manifest["version"]} instead of '
            f'scenes, version {VERSION}: choose another data_root or remove the folder'
        )
    else:
        found = '{train} train, {val} val, {height}x{width}, seed {seed}'.format(**manifest)
        print_log(f'scenes in {folder}: {found}', 'current')
