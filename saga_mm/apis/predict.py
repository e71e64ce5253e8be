"""Predicts with detectors and segmentors on image files, and draws what they find."""

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

# The names of classes are not drawn into larger images, in pixels: to find a place for them, mmseg
# makes a list of all pixels.
LARGEST_WITH_NAMES = 2**22


class Prediction(NamedTuple):
    """What a model finds in an image.

    Attributes:
        sample: The data sample of mmdet or mmseg, on the CPU.
        text: The same in words, in one line.
        picture: Drawn into the image: (H, W, 3), uint8, BGR.
    """

    sample: BaseDataElement
    text: str
    picture: np.ndarray


class Predictor:
    """Predicts with a trained model on image files, and draws what it finds.

    Images are loaded as the test pipeline of the config does it. Drawings show them in 8 bits, see
    `to_8_bit`.

    Args:
        model (BaseModel): A detector of mmdet or a segmentor of mmseg, from `load_model`.
        score_thr (float): Show objects that score more than this. For detectors only. Defaults to
            0.3.

    Raises:
        ValueError: The model is neither a detector nor a segmentor.
    """

    def __init__(self, model: BaseModel, score_thr: float = 0.3) -> None:
        self.model = model
        self.pipeline = ImagePipeline(model.cfg)
        if toolbox_of(model) == 'mmdet':
            self.draw = _detection_drawer(model.dataset_meta, score_thr)
        else:
            self.draw = _segmentation_drawer(model.dataset_meta)

    def __call__(self, path: str | Path) -> Prediction:
        """What the model finds in an image file.

        Raises:
            ValueError: The file is no image that the pipeline can read.
        """
        data, image = self.pipeline(path)
        picture = to_8_bit(image)
        with torch.no_grad():
            sample = self.model.test_step(pseudo_collate([data]))[0].cpu()
        return Prediction(sample, *self.draw(picture, sample))


Drawer = Callable[[np.ndarray, BaseDataElement], tuple[str, np.ndarray]]


def toolbox_of(model: nn.Module) -> str:
    """'mmdet' for a detector, 'mmseg' for a segmentor; ValueError for anything else."""
    for toolbox, name in (('mmdet', 'BaseDetector'), ('mmseg', 'BaseSegmentor')):
        # what the model is made of has been imported
        models = sys.modules.get(f'{toolbox}.models')
        if models is not None and isinstance(model, getattr(models, name)):
            return toolbox
    raise ValueError(
        f'the model must be a detector of mmdet or a segmentor of mmseg, got {type(model).__name__}'
    )


def _detection_drawer(meta: Mapping, score_thr: float) -> Drawer:
    """Draw boxes, masks and panoptic maps; count objects that score more than `score_thr`."""
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
            # of what belongs to no class, the label is the number of classes
            maps = sample.pred_panoptic_seg.sem_seg % INSTANCE_OFFSET
            texts += _shares(maps, [*classes, 'no class'])
        return ', '.join(texts), visualizer.get_image()[..., ::-1]

    return draw


def _segmentation_drawer(meta: Mapping) -> Drawer:
    """Draw the class of each pixel, and tell each class's share of the pixels."""
    from mmseg.visualization import SegLocalVisualizer

    # its arguments for the classes and the palette are swapped in some versions
    visualizer = SegLocalVisualizer(alpha=0.5)

    def draw(picture: np.ndarray, sample: BaseDataElement) -> tuple[str, np.ndarray]:
        if 'pred_sem_seg' not in sample:
            raise ValueError(f'no label map is predicted, but {", ".join(sample.keys())}')
        # a head with one channel gives its labels as floating-point numbers
        labels = sample.pred_sem_seg.data.long()
        sample.pred_sem_seg.data = labels
        binary = 'seg_logits' in sample and sample.seg_logits.data.shape[0] == 1
        classes, palette = complete_classes(meta, labels, binary)
        visualizer.dataset_meta = dict(classes=classes, palette=palette)
        names = picture.shape[0] * picture.shape[1] <= LARGEST_WITH_NAMES
        # of an image of one pixel, mmseg takes a tensor of labels for an index
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


def complete_classes(
    meta: Mapping, labels: Tensor, binary: bool = False
) -> tuple[list[str], list[tuple[int, ...]]]:
    """Names and colours of classes; labels without them get some.

    Args:
        meta: May have `classes` and `palette`, as `dataset_meta` of a model.
        labels: What was predicted.
        binary: Labels are 0 and 1, of a head with a single channel. If there is a single class, it
            is that of label 1.
    """
    classes = meta.get('classes') or []
    classes = [classes] if isinstance(classes, str) else list(map(str, classes))
    palette = meta.get('palette')
    colors = [] if palette is None or isinstance(palette, str) else [tuple(c) for c in palette]
    if binary and len(classes) == 1:
        classes, colors = ['background', *classes], [(0, 0, 0), *colors]
    number = max(len(classes), int(labels.max()) + 1 if labels.numel() else 0)
    classes += [f'class {i}' for i in range(len(classes), number)]
    # as mmseg makes them up
    made_up = np.random.RandomState(42).randint(0, 255, (number, 3)).tolist()
    return classes, colors + [tuple(color) for color in made_up[len(colors) :]]


def _counts(labels: Tensor) -> list[tuple[int, int]]:
    """Each label and how often it is there, most frequent first."""
    values, counts = labels.unique(return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])


def _shares(labels: Tensor, classes: Sequence[str]) -> list[str]:
    """Shares of pixels, by classes."""
    texts = []
    for label, count in _counts(labels):
        share = 100 * count / labels.numel()
        number = f'{share:.1f}' if share >= 0.1 else '<0.1'
        texts.append(f'{classes[label].strip()} {number} %')
    return texts
