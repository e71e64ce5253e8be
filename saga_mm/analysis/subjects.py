"""Loads the models that an analysis compares, and images as the config of each model does."""

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
    """A model, and the way in which its config loads images.

    Attributes:
        model: A model in eval mode, with a backbone of saga_mm.
        pipeline: The test pipeline of its config.
    """

    model: BaseModel
    pipeline: ImagePipeline

    def load(self, path: Path, size: Sequence[int] | None = None) -> np.ndarray:
        """Load an image: (H, W) or (H, W, bands).

        Args:
            path: The file.
            size: Height and width to resize the image to. Defaults to its own size.

        Raises:
            ValueError: The file is not an image. The message names it.
        """
        try:
            image = self.pipeline.load(path)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
        if size:
            image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
        return image

    def prepare(self, image: np.ndarray) -> Tensor:
        """Make the input of the backbone of an image: (1, C, H, W)."""
        # float32, as torch supports few operations on 16-bit integers
        pixels = torch.from_numpy(np.atleast_3d(image).astype(np.float32)).permute(2, 0, 1)
        return self.model.data_preprocessor(dict(inputs=[pixels], data_samples=None))['inputs']


def load_subject(config: str, checkpoint: str | None, device: torch.device) -> Subject:
    """Build the model of a config, with weights of a checkpoint or with reproducible random ones.

    Args:
        config: A config file.
        checkpoint: A file or a URL; None or '' for an untrained model.
        device: The device of the model.

    Raises:
        ValueError: The backbone is not one of saga_mm, or the checkpoint does not fit.
    """
    cfg = load_config(config, {}, ('model',))
    torch.manual_seed(0)
    model = build_model(cfg)
    backbone_of(model, config)
    if checkpoint:
        load_complete_weights(model, checkpoint)
    return Subject(model.to(device), ImagePipeline(cfg))
