"""Loads trained models for inference."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from torch import nn

from ..checkpoint import load_file, load_model_weights, read_dataset_meta
from .build import build_model
from .pipeline import innermost_dataset

# weights with this prefix are used in training only
TRAINING_ONLY = 'auxiliary_head.'


def load_complete_weights(model: nn.Module, path: str) -> dict | None:
    """Load all weights that predictions need from a checkpoint into `model`.

    Args:
        model: A detector or segmentor.
        path: A file or a URL, as in `saga_mm.checkpoint.load_file`.

    Returns:
        Metadata of the data set in the checkpoint, such as 'classes'; None if there is none.

    Raises:
        CheckpointError: The file can't be read, or lacks a weight that predictions need.
    """
    checkpoint = load_file(path)
    match = load_model_weights(model, checkpoint, path, complete=True, optional=TRAINING_ONLY)
    if match.missing or match.unexpected:
        print(f'{path}, weights: {match}')
    return read_dataset_meta(checkpoint, path)


def load_model(cfg: Config, checkpoint: str, device: torch.device) -> BaseModel:
    """Build the model of a config with trained weights, for a `Predictor`.

    Class names and colours come from the checkpoint or, if it has none, from the test data set of
    the config.

    Args:
        cfg: With `model` and `test_dataloader`.
        checkpoint: As in `load_complete_weights`.
        device: Where the model goes.

    Returns:
        The model, with the attributes `cfg` and `dataset_meta` that mmdet's and mmseg's inference
        functions read.

    Raises:
        CheckpointError: As in `load_complete_weights`.
    """
    model = build_model(cfg)
    meta = load_complete_weights(model, checkpoint)
    if meta is None:
        dataset = innermost_dataset(cfg.test_dataloader.dataset)
        meta = DATASETS.build({**dataset, 'lazy_init': True}).metainfo
    model.dataset_meta = {key.lower(): value for key, value in meta.items()}
    palette = model.dataset_meta.get('palette')
    # it may also be the name of a palette of mmdet
    if palette and not isinstance(palette, str):
        # mmdet would take a tuple for one colour of all classes
        model.dataset_meta['palette'] = [tuple(color) for color in palette]
    model.cfg = cfg
    return model.to(device)
