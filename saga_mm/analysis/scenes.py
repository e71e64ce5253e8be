"""Draws predictions of a segmentor beside the truth."""

from __future__ import annotations

from pathlib import Path

import mmcv
import numpy as np
import torch
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.model import BaseModel

from .files import make_figure, write_figure

ROWS = 3


def draw_scenes(model: BaseModel, dataset: BaseDataset, title: str, path: Path) -> None:
    """Draw six scenes, evenly spread over `dataset`: image, truth, prediction, and a legend."""
    from matplotlib.patches import Patch

    classes, palette = dataset.metainfo['classes'], dataset.metainfo['palette']
    # the label 255, which is ignored, is white
    colors = np.full((256, 3), 255, np.uint8)
    colors[: len(palette)] = palette

    figure = make_figure(14, 6)
    figure.suptitle(title)
    halves = figure.subfigures(1, 2, squeeze=False)[0]
    axes = np.concatenate([half.subplots(ROWS, 3) for half in halves])
    for ax, name in zip(axes[::ROWS].flat, 2 * ('image', 'truth', 'prediction'), strict=True):
        ax.set_title(name, fontsize='medium')
    for ax in axes.flat:
        ax.set_axis_off()
    indices = np.linspace(0, len(dataset) - 1, len(axes)).round().astype(int).tolist()
    for row, index in zip(axes, indices, strict=True):
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0].cpu()
        row[0].imshow(mmcv.imread(sample.img_path, channel_order='rgb'))
        row[1].imshow(colors[sample.gt_sem_seg.data[0].numpy()], interpolation='nearest')
        row[2].imshow(colors[sample.pred_sem_seg.data[0].numpy()], interpolation='nearest')
    patches = [
        Patch(facecolor=np.divide(color, 255), edgecolor='gray', label=name)
        for name, color in zip(classes, palette, strict=True)
    ]
    figure.legend(handles=patches, loc='outside lower center', ncols=len(classes), frameon=False)
    write_figure(path, figure, dpi=120)
