"""Writes a short config for data that were looked at."""

from __future__ import annotations

import pprint
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .files import Source
from .images import Loading
from .labels import Classes

# pixels of the sides of a crop
STEP, LARGEST_CROP = 32, 512
# longer images are tested in windows
LONGEST_WHOLE, WINDOW, STRIDE = 2048, 1024, 768
# objects below are enlarged, to cover some tokens of the finest map, of 4 pixels each
SMALL_OBJECT = 16
LONGEST_DETECTION, SHORTEST_DETECTION = 1024, 256

HEAD = '''"""{title}"""

_base_ = [
    'saga_mm::{task}/_base_/models/{model}.py',
    'saga_mm::{task}/_base_/datasets/own.py',
    'saga_mm::{task}/_base_/schedules/adamw_short.py',
    'saga_mm::{task}/_base_/default_runtime.py',
]

data_root = {root}
metainfo = dict(
    classes={classes},
    palette={palette},
)
load = [
{load}
]
'''

SEGMENTATION = """train_pipeline = [
    *load,
    dict(type='RandomResize', scale={scale}, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size={crop}, cat_max_ratio=0.95),
    dict(type='RandomFlip', prob=0.5),
{colors}    dict(type='PackSegInputs'),
]
test_pipeline = [*load, dict(type='PackSegInputs')]
train_dataloader = dict(
    dataset={train}
)
val_dataloader = dict(
    dataset={val}
)
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(
        size={crop},
{normalize}
    ),
{in_channels}    decode_head=dict(num_classes={number}),{test_cfg}
)
# iterations of 8 crops, which suit a first look: more of them give better results
train_cfg = dict(max_iters=450)
"""

DETECTION = """annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask={masks})
train_pipeline = [
    *load,
    annotations,
    dict(type='RandomResize', scale={scale}, ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    *load,
    dict(type='Resize', scale={scale}, keep_ratio=True),
    annotations,
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file={train},
        data_prefix=dict(img={train_images}),
        metainfo=metainfo,
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        ann_file={val},
        data_prefix=dict(img={val_images}),
        metainfo=metainfo,
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={evaluated}, metric={metric})
test_evaluator = val_evaluator

model = dict(
    data_preprocessor=dict(
{normalize}
    ),
{in_channels}{heads}
)
# of 4 images: more epochs give better results
train_cfg = dict(max_epochs=12)
"""


def segmentation_config(
    title: str,
    root: Path,
    sources: Mapping[str, Sequence[tuple[Source, str | None]]],
    loading: Loading,
    classes: Classes,
    sizes: np.ndarray,
) -> str:
    """The text of a config for segmentation.

    Args:
        title: A line on what it is.
        root: The folder of the data.
        sources: Of 'train' and 'val', each with the name of the file that lists its images, beside
            the config, if there is one.
        loading: How images are loaded.
        classes: Of the masks.
        sizes: Height and width of each image, (images, 2).
    """
    height, width = np.median(sizes, 0).astype(int).tolist()
    crop = tuple(max(min(side // STEP * STEP, LARGEST_CROP), STEP) for side in (height, width))
    labels: dict[str, object] = dict(type='LoadAnnotations')
    if not classes.is_plain:
        labels = dict(type='saga_mm.LoadLabelMap', values=list(classes.values))
    test_cfg = ''
    if sizes.max() > LONGEST_WHOLE:
        window = f'crop_size=({WINDOW}, {WINDOW}), stride=({STRIDE}, {STRIDE})'
        test_cfg = f"\n    test_cfg=dict(mode='slide', {window}),"
    return (HEAD + SEGMENTATION).format(
        title=title,
        task='segmentation',
        model='segformer_head_small',
        root=repr(str(root)),
        classes=_format(classes.names, 4),
        palette=_format([list(color) for color in classes.palette], 4),
        load=_transforms([*_load(loading), labels]),
        scale=(width, height),
        crop=crop,
        colors="    dict(type='PhotoMetricDistortion'),\n" if loading.is_color else '',
        train=_datasets(sources['train'], 'train_pipeline'),
        val=_datasets(sources['val'], 'test_pipeline'),
        number=len(classes.names),
        test_cfg=test_cfg,
        **_normalize(loading),
    )


def detection_config(
    title: str,
    root: Path,
    files: Mapping[str, tuple[str, str]],
    loading: Loading,
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
    sizes: np.ndarray,
    object_sizes: np.ndarray,
    with_masks: bool,
) -> str:
    """The text of a config for detection.

    Args:
        title: A line on what it is.
        root: The folder of the data.
        files: Of 'train' and 'val', the COCO file, as Python, and the folder of the images.
        loading: How images are loaded.
        names: Of the classes.
        palette: A colour for each.
        sizes: Height and width of each image, (images, 2).
        object_sizes: The square root of the area of each box, in pixels.
        with_masks: Whether all objects have a mask.
    """
    number = len(names)
    heads = f'    bbox_head=dict(num_classes={number}),'
    if with_masks:
        parts = ', '.join(f'{part}_head=dict(num_classes={number})' for part in ('bbox', 'mask'))
        heads = f'    roi_head=dict({parts}),'
    evaluated = {split: name for split, (name, _) in files.items()}['val']
    if not evaluated.startswith("'{{"):
        evaluated = f"data_root + '/' + {evaluated}"
    return (HEAD + DETECTION).format(
        title=title,
        task='detection',
        model='mask_rcnn_small' if with_masks else 'retinanet',
        root=repr(str(root)),
        classes=_format(tuple(names), 4),
        palette=_format([tuple(color) for color in palette], 4),
        load=_transforms(_load(loading)),
        masks=with_masks,
        scale=_detection_scale(sizes, object_sizes),
        train=files['train'][0],
        train_images=repr(files['train'][1]),
        val=files['val'][0],
        val_images=repr(files['val'][1]),
        evaluated=evaluated,
        metric=repr(['bbox', 'segm'] if with_masks else 'bbox'),
        heads=heads,
        **_normalize(loading),
    )


def _detection_scale(sizes: np.ndarray, object_sizes: np.ndarray) -> tuple[int, int]:
    """Width and height to which images are scaled."""
    height, width = np.median(sizes, 0)
    factor = 2.0 if len(object_sizes) and np.median(object_sizes) < SMALL_OBJECT else 1.0
    factor = max(factor, SHORTEST_DETECTION / max(height, width))
    factor = min(factor, LONGEST_DETECTION / max(height, width))
    return round(width * factor), round(height * factor)


def _load(loading: Loading) -> list[dict]:
    transforms = [loading.options]
    if loading.channels not in (1, 3):
        # data preprocessors take one or three channels
        mean, std = (_round(values) for values in (loading.mean, loading.std))
        transforms.append(dict(type='Normalize', mean=mean, std=std, to_rgb=False))
    return transforms


def _normalize(loading: Loading) -> dict[str, str]:
    """Lines for the data preprocessor and for the backbone."""
    mean, std = _round(loading.mean), _round(loading.std)
    if loading.channels == 3:
        # as OpenCV reads them, blue comes first
        values = [f'mean={mean[::-1]}', f'std={std[::-1]}']
    elif loading.channels == 1:
        values = [f'mean={mean}', f'std={std}', 'bgr_to_rgb=False']
    else:
        values = ['mean=None', 'std=None', 'bgr_to_rgb=False']
    channels = '' if loading.channels == 3 else f'in_channels={loading.channels}'
    return dict(
        normalize='\n'.join(f'        {value},' for value in values),
        in_channels=f'    backbone=dict({channels}),\n' if channels else '',
    )


def _round(values: np.ndarray) -> list[float]:
    """Four digits, which is more than the statistics of images tell."""
    return [float(f'{value:.4g}') for value in values]


def _datasets(sources: Sequence[tuple[Source, str | None]], pipeline: str) -> str:
    """The data set of a split, or several of them."""
    if len(sources) == 1:
        return _dataset(*sources[0], pipeline, 4) + ','
    parts = ''.join(f'            {_dataset(*one, pipeline, 12)},\n' for one in sources)
    lines = ['_delete_=True', "type='ConcatDataset'", f'datasets=[\n{parts}        ]']
    return 'dict(\n' + ''.join(f'        {line},\n' for line in lines) + '    ),'


def _dataset(source: Source, listed: str | None, pipeline: str, indent: int) -> str:
    prefix = f'img_path={source.img_path!r}, seg_map_path={source.seg_map_path!r}'
    lines = ['data_root=data_root', f'data_prefix=dict({prefix})']
    lines += [f'img_suffix={source.img_suffix!r}', f'seg_map_suffix={source.seg_map_suffix!r}']
    if listed is not None:
        lines.append(f'ann_file={beside(listed)}')
    lines += ['metainfo=metainfo', f'pipeline={pipeline}']
    if indent > 4:
        lines.insert(0, "type='BaseSegDataset'")
        lines += ['test_mode=True'] if pipeline.startswith('test') else []
    space = ' ' * (indent + 4)
    body = ''.join(f'{space}{line},\n' for line in lines)
    return f'dict(\n{body}{" " * indent})'


def beside(name: str) -> str:
    """A file in the folder of the config, as Python."""
    return repr('{{ fileDirname }}/' + name)


def _transforms(transforms: Sequence[dict]) -> str:
    lines = []
    for transform in transforms:
        options = ', '.join(f'{key}={value!r}' for key, value in transform.items())
        lines.append(f'    dict({options}),')
    return '\n'.join(lines)


def _format(value: object, indent: int) -> str:
    text = pprint.pformat(value, width=88, compact=True)
    return text.replace('\n', '\n' + ' ' * indent)
