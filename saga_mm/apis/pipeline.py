"""Loads images with the test pipeline of a config, of any number of bands and any bit depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import mmcv.transforms
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose

from .tiff_rows import TiffRows

# what image libraries raise for a file that is not an image, or for an image that is too large
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
# Percentiles of the values of an image that are shown as black and as white.
BLACK, WHITE = 1, 99


class ImagePipeline:
    """The test pipeline of a config, without the transforms that load annotations.

    Args:
        cfg (Config): The pipeline is that of its `test_dataloader`. If there is none, images are
            loaded as 8-bit colour images and not transformed.
    """

    def __init__(self, cfg: Config) -> None:
        transforms = Compose(_test_pipeline(cfg)).transforms
        self.transforms = [t for t in transforms if not _loads_annotations(t)]

    def load(self, path: str | Path) -> np.ndarray:
        """Load an image file: (H, W) or (H, W, bands), of any dtype.

        Raises:
            ValueError: The file is not an image, or not a regular file.
        """
        return self._load(path)[0]['img']

    def __call__(self, path: str | Path) -> tuple[dict, np.ndarray]:
        """Load and transform an image file.

        Returns:
            The result of the pipeline, with `inputs` and `data_samples`, and the image as it was
            loaded.

        Raises:
            ValueError: The file is not an image, or not a regular file.
        """
        results, rest = self._load(path)
        image = results['img']
        for transform in rest:
            results = transform(results)
        return results, image

    def open_rows(self, path: str | Path) -> dict:
        """What `__call__` returns as its result for a TIFF image, without reading the image.

        Returns:
            `inputs`, which are `TiffRows`, and `data_samples`.

        Raises:
            ValueError: Only the whole image can be read; the message says why.
        """
        load, *rest = self.transforms
        if type(load) is not mmcv.transforms.LoadImageFromFile or not _loads_like_opencv(load):
            raise ValueError(f'the test pipeline loads it with {load}')
        if [type(transform).__name__ for transform in rest] != ['PackSegInputs']:
            names = ', '.join(type(transform).__name__ for transform in rest)
            raise ValueError(f'the test pipeline has {names or "nothing"} after its loading')
        if not Path(path).is_file():
            raise ValueError('not a regular file')
        try:
            image = TiffRows(path)
        except ImportError as error:
            raise ValueError(str(error)) from error
        size = tuple(image.shape[1:])
        meta = dict(img_path=str(path), img_id=0, img_shape=size, ori_shape=size)
        return dict(rest[0](meta), inputs=image)

    def _load(self, path: str | Path) -> tuple[dict, list[Callable]]:
        """Run the transforms up to the one that loads the image; return its result and the rest."""
        # reading a pipe could wait forever
        if not Path(path).is_file():
            raise ValueError('not a regular file')
        # what data sets of mmdet and mmseg give for an image without annotations
        results = dict(img_path=str(path), img_id=0, instances=[], seg_fields=[])
        for i, transform in enumerate(self.transforms, 1):
            try:
                results = transform(results)
            except UNREADABLE as error:
                reason = f'{type(error).__name__}: {error}'
                if not Path(path).stat().st_size:
                    reason = 'the file is empty'
                raise ValueError(f'not readable as an image: {reason}') from error
            if results is None:
                break
            if results.get('img') is not None:
                return results, self.transforms[i:]
        raise ValueError('not readable as an image')


def to_8_bit(image: np.ndarray) -> np.ndarray:
    """Convert an image to a picture that can be shown: (H, W, 3), uint8, BGR.

    It shows the first three bands, or the first one in grey if there are fewer than three. Values
    beyond 8 bits are scaled linearly, so that the darkest percent becomes black and the brightest
    percent white.

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


def _loads_like_opencv(load: mmcv.transforms.LoadImageFromFile) -> bool:
    backend = load.imdecode_backend or mmcv.image.io.imread_backend
    return load.color_type == 'color' and backend == 'cv2' and not load.to_float32


def _loads_annotations(transform: object) -> bool:
    # some loaders of mmseg have no base class in common with the others
    name = type(transform).__name__
    known = isinstance(transform, mmcv.transforms.LoadAnnotations)
    return known or re.fullmatch(r'Load.*Annotations?', name) is not None
