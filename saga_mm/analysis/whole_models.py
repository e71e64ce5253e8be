"""Whole models for measurements: heads on backbones by name, and what each part of one takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..apis import build_model, toolbox_of
from ..cli import load_config
from ..shipped import configs_dir
from .measure import added_memory, timed

# Heads by name, and the config that each comes from.
HEADS = {
    'upernet': 'segmentation/upernet_saga_t.py',
    'upernet128': 'segmentation/upernet128_saga_t.py',
    'semantic_fpn': 'segmentation/fpn_saga_t.py',
    'segformer_head': 'segmentation/segformer_head_saga_t.py',
    'mask_rcnn': 'detection/mask_rcnn_saga_t.py',
    'retinanet': 'detection/retinanet_saga_t.py',
}


def config_of(head: str, backbone: Mapping) -> Config:
    """The config of a head on a backbone.

    Args:
        head: One of `HEADS`.
        backbone: The config of a backbone with four stages.
    """
    cfg = load_config(f'{configs_dir()}/{HEADS[head]}', {}, ('model',))
    backbone = dict(backbone, out_indices=cfg.model.backbone.get('out_indices', (0, 1, 2, 3)))
    model = MODELS.build(backbone)
    model.eval()
    with torch.no_grad():
        widths = [map_.shape[1] for map_ in model(torch.zeros(1, 3, 64, 64))]
    cfg.model.backbone = backbone
    reader = cfg.model.get('neck') or cfg.model.decode_head
    reader.in_channels = widths
    if cfg.model.get('auxiliary_head'):
        cfg.model.auxiliary_head.in_channels = widths[cfg.model.auxiliary_head.in_index]
    return cfg


def build_whole(head: str, backbone: Mapping) -> BaseModel:
    """A head of `HEADS` on a backbone, with random weights."""
    return build_model(config_of(head, backbone))


def parts_of(
    model: BaseModel, images: Tensor, samples: Sequence
) -> list[tuple[str, Callable[[Any], Any]]]:
    """The parts of a model, which take the result of the part before, the first one the images.

    Args:
        model: A segmentor of mmseg, or a detector of mmdet with a dense head or with RPN and RoI
            heads.
        images: (B, C, H, W).
        samples: Their data samples.

    Raises:
        ValueError: The model is neither.
    """
    metas = [sample.metainfo for sample in samples]
    parts: list[tuple[str, Callable[[Any], Any]]] = [('backbone', model.backbone)]
    if model.with_neck:
        parts.append(('neck', model.neck))
    if toolbox_of(model) == 'mmseg':
        head = model.decode_head
        return [
            *parts,
            ('head', head),
            (
                'post-processing',
                lambda logits: model.postprocess_result(
                    head.predict_by_feat(logits, metas), list(samples)
                ),
            ),
        ]
    if getattr(model, 'with_rpn', False) and model.with_roi_head:
        return [
            *parts,
            ('RPN', lambda maps: (maps, model.rpn_head.predict(maps, samples, rescale=False))),
            # RoI heads select boxes before they compute masks
            (
                'RoI heads and post-processing',
                lambda found: model.roi_head.predict(*found, samples, rescale=False),
            ),
        ]
    if hasattr(getattr(model, 'bbox_head', None), 'predict_by_feat'):
        head = model.bbox_head
        return [
            *parts,
            ('head', head),
            (
                'post-processing',
                lambda outs: head.predict_by_feat(*outs, batch_img_metas=metas, rescale=False),
            ),
        ]
    raise ValueError(f'the parts of {type(model).__name__} are not known')


def measure_parts(model: BaseModel, images: Tensor) -> list[dict]:
    """Measure each part of a model in inference.

    Returns:
        For each part: `part`, its name; `seconds` per image; and `bytes` that it adds to the
        memory, its result included.
    """
    if toolbox_of(model) == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    samples = make_samples(images, Sample)
    results, value = [], images
    with torch.no_grad():
        for name, part in parts_of(model, images, samples):
            outputs: list = [None]

            def step(part: Callable = part, value: Any = value, outputs: list = outputs) -> None:
                outputs[0] = part(value)

            added = added_memory(step, images.device)
            seconds = median(timed(step, images.device)) / len(images)
            results.append(dict(part=name, seconds=seconds, bytes=added))
            (value,) = outputs
    return results


def make_samples(
    images: Tensor, kind: type[BaseDataElement] = BaseDataElement
) -> list[BaseDataElement]:
    """Data samples of images that were neither resized nor padded."""
    size = tuple(images.shape[-2:])
    info = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1.0, 1.0),
    )
    return [kind(metainfo=info) for _ in images]


def table_of_parts(results: Sequence[Mapping]) -> str:
    """Format the parts of models as a table in Markdown: medians over rounds."""
    groups: dict[tuple, list[Mapping]] = {}
    for result in results:
        groups.setdefault((result['dtype'], result['size'], result['model']), []).append(result)
    lines = [
        '| dtype | side | model | part | seconds per image | share | peak memory, MiB |',
        '|---|--:|---|---|--:|--:|--:|',
    ]
    for (dtype, size, model), rounds in groups.items():
        label = Path(model).stem if Path(model).is_file() else model
        errors = [result['error'] for result in rounds if 'error' in result]
        if errors:
            lines.append(f'| {dtype} | {size} | {label} | {errors[0]} ||||')
            continue
        rows = [
            (
                parts[0]['part'],
                median(part['seconds'] for part in parts),
                median(part['bytes'] for part in parts),
            )
            for parts in zip(*(result['parts'] for result in rounds), strict=True)
        ]
        total = sum(seconds for _, seconds, _ in rows)
        rows.append(('sum', total, max(bytes_ for _, _, bytes_ in rows)))
        lines += [
            f'| {dtype} | {size} | {label} | {part} | {seconds:.3g} | {seconds / total:.0%} '
            f'| {bytes_ / 2**20:.0f} |'
            for part, seconds, bytes_ in rows
        ]
    return '\n'.join(lines)
