"""Reads images as the test pipeline of a config does: any number of bands, any bit depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import mmcv.transforms
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose

# what libraries raise on a file that is not an image, or an image that is too large
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    cv2.error,
)
# Of the values of an image, in percent: these become black and white where it has not 8 bits.
BLACK, WHITE = 1, 99


class ImagePipeline:
    """The test pipeline of a config, without what loads annotations.

    Args:
        cfg (Config): Its `test_dataloader` has the pipeline. Without one, images are loaded in 8
            bits and three bands, and that is all.
    """

    def __init__(self, cfg: Config) -> None:
        transforms = Compose(_test_pipeline(cfg)).transforms
        self.transforms = [t for t in transforms if not _loads_annotations(t)]

    def load(self, path: str | Path) -> np.ndarray:
        """An image file as the pipeline loads it: (H, W) or (H, W, bands), of any dtype.

        Raises:
            ValueError: It is no image, or no regular file.
        """
        return self._load(path)[0]['img']

    def __call__(self, path: str | Path) -> tuple[dict, np.ndarray]:
        """An image file for `model.test_step`, collated as a batch of one, and as it was loaded.

        Raises:
            ValueError: It is no image, or no regular file.
        """
        results, rest = self._load(path)
        image = results['img']
        for transform in rest:
            results = transform(results)
        return results, image

    def _load(self, path: str | Path) -> tuple[dict, list[Callable]]:
        """What there is after the transform that loads the image, and the transforms after that."""
        # a pipe might never end
        if not Path(path).is_file():
            raise ValueError('not a regular file')
        # as mmdet's and mmseg's data sets tell it of an image without annotations
        results = dict(img_path=str(path), img_id=0, instances=[], seg_fields=[])
        for i, transform in enumerate(self.transforms, 1):
            try:
                results = transform(results)
            except UNREADABLE as error:
                reason = f'{type(error).__name__}: {error}'
                raise ValueError(f'not readable as an image ({reason})') from error
            if results is None:
                break
            if results.get('img') is not None:
                return results, self.transforms[i:]
        raise ValueError('not readable as an image')


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """A picture of an image, (H, W, 3), uint8, BGR.

    Of an image with more bands it shows the first three, and of one with fewer the first, in grey.
    Images of more than 8 bits are stretched: their darkest and brightest percent become black and
    white.

    Args:
        image: (H, W) or (H, W, bands), of any dtype.
    """
    image = np.atleast_3d(image)
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., :1]
    with np.errstate(invalid='ignore'):
        bytes_ = image.astype(np.uint8)
    if not np.array_equal(bytes_, image):
        values = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0)
        black, white = np.percentile(values, (BLACK, WHITE))
        stretched = (values - black) / max(white - black, np.finfo(np.float32).tiny)
        bytes_ = (255 * stretched.clip(0, 1)).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(bytes_, (*image.shape[:2], 3)))


def innermost_dataset(dataset: Mapping) -> Mapping:
    """The config of the first data set inside of wrappers such as ConcatDataset."""
    while True:
        inner = dataset.get('dataset') or next(iter(dataset.get('datasets') or ()), None)
        if not isinstance(inner, Mapping):
            return dataset
        dataset = inner


def _test_pipeline(cfg: Config) -> list:
    dataset = innermost_dataset((cfg.get('test_dataloader') or {}).get('dataset') or {})
    pipeline = dataset.get('pipeline') or cfg.get('test_pipeline')
    return pipeline or [dict(type=mmcv.transforms.LoadImageFromFile)]


def _loads_annotations(transform: object) -> bool:
    # mmseg has some that share no class with the others
    name = type(transform).__name__
    known = isinstance(transform, mmcv.transforms.LoadAnnotations)
    return known or re.fullmatch(r'Load.*Annotations?', name) is not None
