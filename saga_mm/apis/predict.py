"""Predicts with detectors and segmentors, and draws what they find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

# of an image (H, W, 3), uint8, BGR, and the file to draw to; returns what there is in words
Draw = Callable[[np.ndarray, Path], str]


def make_detector(model: nn.Module, score_thr: float) -> Draw:
    """Draw boxes and masks that score more than `score_thr`, and count them per class."""
    from mmdet.apis import inference_detector
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    # mmdet knows how to make up colours
    visualizer.dataset_meta = {'palette': 'random', **model.dataset_meta}

    def draw(image: np.ndarray, out_file: Path) -> str:
        sample = inference_detector(model, image).cpu()
        visualizer.add_datasample(
            'image',
            image[..., ::-1],
            sample,
            draw_gt=False,
            pred_score_thr=score_thr,
            out_file=str(out_file),
        )
        found = sample.pred_instances
        found = found[found.scores > score_thr]
        texts = []
        for label, count in Counter(found.labels.tolist()).most_common():
            best = found.scores[found.labels == label].max()
            texts.append(f'{count} {model.dataset_meta["classes"][label]} (best {best:.2f})')
        return ', '.join(texts) or f'nothing scores more than {score_thr}'

    return draw


def make_segmentor(model: nn.Module) -> Draw:
    """Draw the class of each pixel, and tell each class's share of the pixels."""
    from mmseg.apis import inference_model
    from mmseg.visualization import SegLocalVisualizer

    # where mmseg looks for it
    if 'test_pipeline' not in model.cfg:
        model.cfg.test_pipeline = model.cfg.test_dataloader.dataset.pipeline
    # its arguments for the classes and the palette are swapped in some versions
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray, out_file: Path) -> str:
        sample = inference_model(model, image).cpu()
        visualizer.add_datasample(
            'image', image[..., ::-1], sample, draw_gt=False, out_file=str(out_file)
        )
        labels = sample.pred_sem_seg.data.flatten().tolist()
        texts = []
        for label, count in Counter(labels).most_common():
            share = 100 * count / len(labels)
            number = f'{share:.1f}' if share >= 0.1 else '<0.1'
            texts.append(f'{model.dataset_meta["classes"][label].strip()} {number} %')
        return ', '.join(texts)

    return draw
