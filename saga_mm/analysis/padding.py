"""Measures how much the padding of a batch changes the features of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from ..preprocessors import add_mask


def leak(cfg: dict, image: Tensor, size: tuple[int, int]) -> list[float]:
    """For each stage, the RMS of the change inside the image over the RMS without padding.

    Args:
        cfg: Config of a backbone, with `pad_mask`. Its weights are random.
        image: An image (1, 3, h, w).
        size: Height and width of the padded image.
    """
    torch.manual_seed(0)
    model = MODELS.build(cfg).eval()
    height, width = image.shape[2:]
    padded = F.pad(image, (0, size[1] - width, 0, size[0] - height))
    if cfg['pad_mask']:
        image, padded = (add_mask(x, [(height, width)]) for x in (image, padded))
    with torch.no_grad():
        pairs = zip(model(padded), model(image), strict=True)
    return [
        ((x[:, :, : truth.shape[2], : truth.shape[3]] - truth).norm() / truth.norm()).item()
        for x, truth in pairs
    ]
