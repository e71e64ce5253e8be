"""Writes what a model predicts as data: label maps, and objects as a COCO file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement

from ..checkpoint import printable, write_atomically
from .class_maps import write_class_map
from .predict import complete_classes, toolbox_of


def write_label_map(path: Path, sample: BaseDataElement, meta: Mapping, image: Path) -> None:
    """Write the class of each pixel as a PNG file with the colours of the classes as its palette.

    Args:
        path: The file.
        sample: The prediction of a segmentor.
        meta: `dataset_meta` of the model.
        image: The file that the prediction is of.

    Raises:
        OSError: `path` can't be written; it is as it was.
    """
    labels = sample.pred_sem_seg.data[0].long()
    binary = 'seg_logits' in sample and sample.seg_logits.data.shape[0] == 1
    classes, palette = complete_classes(meta, labels, binary)
    dtype = np.uint8 if len(classes) <= 256 else np.uint16
    height, width = labels.shape
    write_class_map(path, [labels.numpy()], (height, width), dtype, palette, image)


class PredictionFiles:
    """Writes predictions for images: a label map each, or one COCO file, `predictions.json`.

    Args:
        model (BaseModel): A segmentor or a detector, from `load_model`.
        folder (Path): Where the files are written.
        score_thr (float): Objects that score more than this are in the COCO file.

    Raises:
        ValueError: The model predicts neither label maps nor objects.
    """

    def __init__(self, model: BaseModel, folder: Path, score_thr: float) -> None:
        toolbox = toolbox_of(model)
        if toolbox not in ('mmdet', 'mmseg'):
            raise ValueError('--predictions-dir is for detectors and segmentors, got a classifier')
        self.meta = model.dataset_meta
        self.folder = folder
        self.coco = CocoFile(self.meta, score_thr) if toolbox == 'mmdet' else None

    def add(self, image: Path, name: str, sample: BaseDataElement) -> str:
        """Write the label map of an image, or keep its objects; return what to tell.

        Raises:
            OSError: The file can't be written.
            ValueError: A detector has predicted no objects, but something else.
        """
        if self.coco is not None:
            self.coco.add(image, sample)
            return ''
        write_label_map(self.folder / name, sample, self.meta, image)
        return f'; label map: {printable(str(self.folder / name))}'

    def finish(self) -> str | None:
        """Write the objects of all images; return the name of the file, if there is one.

        Raises:
            OSError: The file can't be written.
        """
        if self.coco is None:
            return None
        self.coco.write(self.folder / 'predictions.json')
        return printable(str(self.folder / 'predictions.json'))


class CocoFile:
    """Objects of several images, as a COCO file with scores.

    Args:
        meta (Mapping): `dataset_meta` of a detector. Class `i` has the category `i + 1`.
        score_thr (float): Objects that score more than this are in the file.
    """

    def __init__(self, meta: Mapping, score_thr: float) -> None:
        self.meta = meta
        self.score_thr = score_thr
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add(self, path: Path, sample: BaseDataElement) -> None:
        """Add the prediction for an image.

        Raises:
            ValueError: There are no objects in it, but something else, such as a panoptic map.
        """
        if 'pred_instances' not in sample:
            raise ValueError(
                f'a COCO file needs objects (pred_instances), got {", ".join(sample.keys())}'
            )
        height, width = sample.ori_shape[:2]
        number = len(self.images) + 1
        self.images.append(
            dict(id=number, file_name=printable(str(path)), width=width, height=height)
        )
        found = sample.pred_instances
        found = found[found.scores > self.score_thr]
        for i, (x, y, right, bottom) in enumerate(found.bboxes.tolist()):
            item = dict(
                id=len(self.annotations) + 1,
                image_id=number,
                category_id=int(found.labels[i]) + 1,
                bbox=[x, y, right - x, bottom - y],
                area=(right - x) * (bottom - y),
                iscrowd=0,
                score=float(found.scores[i]),
            )
            if 'masks' in found:
                item |= dict(segmentation=_encode(found.masks[i]), area=int(found.masks[i].sum()))
            self.annotations.append(item)

    def write(self, path: Path) -> None:
        """Write the file.

        Raises:
            OSError: `path` can't be written; it is as it was.
        """
        labels = torch.tensor([item['category_id'] - 1 for item in self.annotations])
        classes, _ = complete_classes(self.meta, labels)
        categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
        content = dict(images=self.images, annotations=self.annotations, categories=categories)
        write_atomically(path, json.dumps(content).encode())


def _encode(mask: torch.Tensor | np.ndarray) -> dict:
    """A mask (H, W) as run lengths that are text."""
    from pycocotools.mask import encode

    encoded = encode(np.asfortranarray(np.asarray(mask), np.uint8))
    return dict(encoded, counts=encoded['counts'].decode())
