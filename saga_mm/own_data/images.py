"""Looks at images: size, channels, depth, statistics, and how a config has to load them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..apis.class_maps import TIFF_SUFFIXES
from ..apis.pipeline import UNREADABLE
from ..transforms import bands_last

# the channels that OpenCV reads
MOST_CHANNELS = 4
# for the statistics of an image
ENOUGH_PIXELS = 1 << 20


@dataclass(frozen=True)
class Look:
    """What an image file holds, `mean` and `mean_of_squares` of each channel in BGR order."""

    height: int
    width: int
    dtype: str
    mean: np.ndarray
    mean_of_squares: np.ndarray
    # a fourth channel that is the same everywhere
    is_opaque: bool = False
    is_finite: bool = True
    # read by tifffile, because OpenCV can't
    is_bands: bool = False

    @property
    def channels(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Loading:
    """How images are loaded, with the statistics of what is loaded, in its own order of channels.

    `options` are those of the transform; `is_color` stands for 8-bit colour images, in BGR.
    """

    options: dict
    channels: int
    mean: np.ndarray
    std: np.ndarray
    is_color: bool


def look_at_image(path: Path) -> Look:
    """Read an image file.

    Raises:
        ValueError: It is broken, or it can't be read.
    """
    try:
        image, is_bands = _read(path)
    except UNREADABLE as error:
        raise ValueError(f'{type(error).__name__}: {error}') from error
    # of a large image, every second or third pixel will do
    step = math.ceil(math.sqrt(image.shape[0] * image.shape[1] / ENOUGH_PIXELS))
    pixels = image[::step, ::step].reshape(-1, image.shape[2]).astype(np.float64)
    with np.errstate(invalid='ignore', over='ignore'):
        return Look(
            image.shape[0],
            image.shape[1],
            str(image.dtype),
            pixels.mean(0),
            (pixels**2).mean(0),
            is_opaque=image.shape[2] == MOST_CHANNELS and bool(np.ptp(image[..., 3]) == 0),
            is_finite=bool(np.isfinite(image).all()),
            is_bands=is_bands,
        )


def _read(path: Path) -> tuple[np.ndarray, bool]:
    """The image (H, W, channels), and whether tifffile read it."""
    data = path.read_bytes()
    suffix = path.suffix.lower()
    flag = cv2.IMREAD_UNCHANGED
    if suffix not in TIFF_SUFFIXES:
        # OpenCV takes half an image for a whole one
        with Image.open(path) as picture:
            picture.load()
            grey = picture.mode in ('1', 'L')
            if suffix in ('.jpg', '.jpeg'):
                # turned as the camera was held, as in a training
                flag = cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR
            elif picture.mode == 'P':
                flag = cv2.IMREAD_COLOR
    elif find_spec('tifffile') is not None:
        import tifffile

        image = bands_last(tifffile.imread(path))
        if image.ndim != 3:
            raise ValueError(f'an image has up to three dimensions, got {image.shape}')
        if image.shape[2] not in (1, 3, MOST_CHANNELS):
            return image, True
    read = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    if read is None and suffix in TIFF_SUFFIXES:
        if find_spec('tifffile') is None:
            raise ValueError('OpenCV can not read it, tifffile may: pip install tifffile')
        return image, True
    if read is None:
        raise ValueError('OpenCV can not read it')
    return np.atleast_3d(read), False


def choose_loading(looks: Mapping[str, Look], problems: dict[str, list[str]]) -> Loading:
    """Choose how all images are loaded.

    Args:
        looks: By the names of the files.
        problems: Images that can't be loaded as most of them are added to it.
    """
    if all(not look.is_bands and look.dtype == 'uint8' for look in looks.values()):
        channels = {look.channels for look in looks.values()}
        is_opaque = all(look.is_opaque for look in looks.values() if look.channels > 3)
        if channels == {1}:
            return _load(dict(type='LoadImageFromFile', color_type='grayscale'), looks.values(), 1)
        if is_opaque:
            return _load(dict(type='LoadImageFromFile'), looks.values(), 3, is_color=True)
    usual = Counter((x.channels, x.is_bands) for x in looks.values()).most_common(1)[0][0]
    kept = []
    for name, look in looks.items():
        if not look.is_finite:
            problems['images with values that are not finite'].append(name)
        elif (look.channels, look.is_bands) == usual:
            kept.append(look)
        else:
            problems[f'images with another number of channels than {usual[0]}'].append(name)
    unchanged = dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True)
    options = dict(type='saga_mm.LoadBands') if usual[1] else unchanged
    return _load(options, kept, usual[0])


def _load(options: dict, looks: Collection[Look], channels: int, is_color: bool = False) -> Loading:
    """The statistics, in which each image counts the same."""
    mean = np.mean([np.resize(look.mean, channels) for look in looks], 0)
    squares = np.mean([np.resize(look.mean_of_squares, channels) for look in looks], 0)
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    # without a difference, there is nothing to scale
    return Loading(options, channels, mean, np.where(std > 0, std, 1.0), is_color)
