"""Predicts with detectors, segmentors and classifiers on image files, and draws what they find."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from .pipeline import ImagePipeline, to_8_bit

# Names of classes are drawn into images of up to so many pixels: mmseg builds a Python list of all
# pixels to find a place for them.
LARGEST_WITH_NAMES = 2**22
# The base class of the models of each toolbox.
BASE_CLASSES = dict(mmdet='BaseDetector', mmseg='BaseSegmentor', mmpretrain='BaseClassifier')
# Number of classes that are named for an image by a classifier.
BEST = 3


class Prediction(NamedTuple):
    """The prediction for an image.

    Attributes:
        sample: The data sample of mmdet, mmseg or mmpretrain, on the CPU.
        text: A summary in one line.
        picture: The prediction drawn over the image: (H, W, 3), uint8, BGR.
    """

    sample: BaseDataElement
    text: str
    picture: np.ndarray


class Predictor:
    """Predicts with a trained model on image files, and draws the predictions.

    Images are loaded by the test pipeline of the config. Pictures show them in 8 bits (see
    `to_8_bit`).

    Args:
        model (BaseModel): A detector of mmdet, a segmentor of mmseg or a classifier of mmpretrain,
            from `load_model`.
        score_thr (float): Show objects that score more than this. For detectors only. Defaults to
            0.3.

    Raises:
        ValueError: The model is none of these.
    """

    def __init__(self, model: BaseModel, score_thr: float = 0.3) -> None:
        self.model = model
        self.pipeline = ImagePipeline(model.cfg)
        toolbox = toolbox_of(model)
        if toolbox == 'mmdet':
            self.draw = _detection_drawer(model.dataset_meta, score_thr)
        elif toolbox == 'mmseg':
            self.draw = _segmentation_drawer(model.dataset_meta)
        else:
            self.draw = _classification_drawer(model.dataset_meta)

    def __call__(self, path: str | Path) -> Prediction:
        """Predict on an image file.

        Raises:
            ValueError: The file is not an image that the pipeline can read.
        """
        data, image = self.pipeline(path)
        picture = to_8_bit(image)
        with torch.no_grad():
            sample = self.model.test_step(pseudo_collate([data]))[0].cpu()
        return Prediction(sample, *self.draw(picture, sample))


Drawer = Callable[[np.ndarray, BaseDataElement], tuple[str, np.ndarray]]


def toolbox_of(model: nn.Module) -> str:
    """'mmdet' for a detector, 'mmseg' for a segmentor, 'mmpretrain' for a classifier.

    Raises:
        ValueError: The model is none of these.
    """
    for toolbox, name in BASE_CLASSES.items():
        # the toolbox that the model comes from has been imported
        models = sys.modules.get(f'{toolbox}.models')
        if models is not None and isinstance(model, getattr(models, name)):
            return toolbox
    raise ValueError(
        'the model must be a detector of mmdet, a segmentor of mmseg or a classifier of '
        f'mmpretrain, got {type(model).__name__}'
    )


def _detection_drawer(meta: Mapping, score_thr: float) -> Drawer:
    """Make a function that draws and counts objects, and draws panoptic maps."""
    from mmdet.evaluation.functional import INSTANCE_OFFSET
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()

    def draw(picture: np.ndarray, sample: BaseDataElement) -> tuple[str, np.ndarray]:
        found = sample.get('pred_instances')
        labels = found.labels if found is not None else torch.zeros(0, dtype=torch.long)
        classes, palette = complete_classes(meta, labels)
        visualizer.dataset_meta = dict(classes=classes, palette=palette)
        visualizer.add_datasample(
            'image',
            np.ascontiguousarray(picture[..., ::-1]),
            sample,
            draw_gt=False,
            pred_score_thr=score_thr,
        )
        texts = []
        if found is not None:
            found = found[found.scores > score_thr]
            for label, count in _counts(found.labels):
                best = found.scores[found.labels == label].max()
                texts.append(f'{count} {classes[label].strip()} (best {best:.2f})')
            texts = texts or [f'nothing scores more than {score_thr}']
        if 'pred_panoptic_seg' in sample:
            # pixels without a class have the number of classes as their label
            maps = sample.pred_panoptic_seg.sem_seg % INSTANCE_OFFSET
            texts += _shares(maps, [*classes, 'no class'])
        return ', '.join(texts), visualizer.get_image()[..., ::-1]

    return draw


def _segmentation_drawer(meta: Mapping) -> Drawer:
    """Make a function that draws the class of each pixel and computes the share of each class."""
    from mmseg.visualization import SegLocalVisualizer

    # set as an attribute, because some versions of mmseg swap the arguments for classes and palette
    visualizer = SegLocalVisualizer(alpha=0.5)

    def draw(picture: np.ndarray, sample: BaseDataElement) -> tuple[str, np.ndarray]:
        if 'pred_sem_seg' not in sample:
            raise ValueError(
                f'the model must predict a label map (pred_sem_seg), got {", ".join(sample.keys())}'
            )
        # labels of a head with one channel are floating-point numbers
        labels = sample.pred_sem_seg.data.long()
        sample.pred_sem_seg.data = labels
        binary = 'seg_logits' in sample and sample.seg_logits.data.shape[0] == 1
        classes, palette = complete_classes(meta, labels, binary)
        visualizer.dataset_meta = dict(classes=classes, palette=palette)
        names = picture.shape[0] * picture.shape[1] <= LARGEST_WITH_NAMES
        # as an array: mmseg takes a tensor with a single label for an index
        shown = type(sample)(pred_sem_seg=PixelData(data=labels.numpy()))
        visualizer.add_datasample(
            'image',
            np.ascontiguousarray(picture[..., ::-1]),
            shown,
            draw_gt=False,
            with_labels=names,
        )
        return ', '.join(_shares(labels, classes)), visualizer.get_image()[..., ::-1]

    return draw


def _classification_drawer(meta: Mapping) -> Drawer:
    """Make a function that names the classes with the best scores; the picture is left as it is."""

    def draw(picture: np.ndarray, sample: BaseDataElement) -> tuple[str, np.ndarray]:
        if 'pred_score' not in sample:
            raise ValueError(
                f'the model must predict scores (pred_score), got {", ".join(sample.keys())}'
            )
        scores, labels = sample.pred_score.topk(min(BEST, len(sample.pred_score)))
        classes, _ = complete_classes(meta, labels)
        pairs = zip(labels.tolist(), scores.tolist(), strict=True)
        return ', '.join(f'{classes[label]} {score:.2f}' for label, score in pairs), picture

    return draw


def complete_classes(
    meta: Mapping, labels: Tensor, binary: bool = False
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and colours of classes, for all labels that were predicted.

    Args:
        meta: `dataset_meta` of a model. `classes` and `palette` may be missing or too short.
        labels: The predicted labels.
        binary: The head has a single channel, so that labels are 0 and 1. If there is a single
            class, it is that of label 1, and label 0 is the background.
    """
    classes = meta.get('classes') or []
    classes = [classes] if isinstance(classes, str) else list(map(str, classes))
    palette = meta.get('palette')
    colors = [] if palette is None or isinstance(palette, str) else [tuple(c) for c in palette]
    if binary and len(classes) == 1:
        classes, colors = ['background', *classes], [(0, 0, 0), *colors]
    number = max(len(classes), int(labels.max()) + 1 if labels.numel() else 0)
    classes += [f'class {i}' for i in range(len(classes), number)]
    # random, as mmseg chooses them
    made_up = np.random.RandomState(42).randint(0, 255, (number, 3)).tolist()
    return classes, colors + [tuple(color) for color in made_up[len(colors) :]]


def _counts(labels: Tensor) -> list[tuple[int, int]]:
    """Labels with their numbers of occurrences, most frequent first."""
    counts = labels.flatten().bincount().tolist()
    pairs = [(label, count) for label, count in enumerate(counts) if count]
    return sorted(pairs, key=lambda pair: -pair[1])


def _shares(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """The share of pixels of each class, in words."""
    texts = []
    for label, count in _counts(labels):
        share = 100 * count / labels.numel()
        number = f'{share:.1f}' if share >= 0.1 else '<0.1'
        texts.append(f'{classes[label].strip()} {number} %')
    return texts
