"""The models that an analysis compares, and images as each of them loads these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.model import BaseModel
from torch import Tensor

from ..apis import ImagePipeline, backbone_of, build_model, load_complete_weights
from ..cli import load_config


@dataclass(frozen=True)
class Subject:
    """A model, and how its config loads images.

    Attributes:
        model: In eval mode, with a backbone of saga_mm.
        pipeline: The test pipeline of its config.
    """

    model: BaseModel
    pipeline: ImagePipeline

    def load(self, path: Path, size: Sequence[int] | None = None) -> np.ndarray:
        """An image as the config loads it, (H, W) or (H, W, bands).

        Args:
            path: The file.
            size: Height and width to resize it to. Defaults to its own.

        Raises:
            ValueError: It is no image. Names the file.
        """
        try:
            image = self.pipeline.load(path)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        if size:
            image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        return image

    def prepare(self, image: np.ndarray) -> Tensor:
        """What the backbone gets of an image: (1, C, H, W)."""
        # as float32, which it becomes next: torch can do little with integers of 16 bits
        pixels = torch.from_numpy(np.atleast_3d(image).astype(np.float32)).permute(2, 0, 1)
        return self.model.data_preprocessor(dict(inputs=[pixels], data_samples=None))['inputs']


def load_subject(config: str, checkpoint: str | None, device: torch.device) -> Subject:
    """The model of a config, with weights that start the same every time or come from a file.

    Args:
        config: A file.
        checkpoint: A file or a URL; None or '' for an untrained model.
        device: Where the model goes.

    Raises:
        ValueError: The config has no backbone of saga_mm, or the checkpoint does not fit.
    """
    cfg = load_config(config, {}, ('model',))
    torch.manual_seed(0)
    model = build_model(cfg)
    backbone_of(model, config)
    if checkpoint:
        load_complete_weights(model, checkpoint)
    return Subject(model.to(device), ImagePipeline(cfg))
