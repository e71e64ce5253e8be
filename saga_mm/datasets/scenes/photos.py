"""The photographs inside scikit-image's wheel: backgrounds and textures.

They are read as files of the installed package, because skimage.data may download what is missing.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

FILES = dict(
    astronaut='astronaut.png',
    brick='brick.png',
    camera='camera.png',
    cat='chelsea.png',
    coffee='coffee.png',
    grass='grass.png',
    gravel='gravel.png',
    hubble='hubble_deep_field.jpg',
    moon='moon.png',
    motorcycle='motorcycle_left.png',
    page='page.png',
    retina='retina.jpg',
    rocket='rocket.jpg',
    tissue='ihc.png',
)
# The backgrounds of the scenes.
BACKGROUNDS = (
    *('astronaut', 'camera', 'cat', 'motorcycle', 'rocket') * 2,
    *('coffee', 'hubble', 'moon', 'retina', 'tissue'),
    *('brick', 'grass', 'gravel'),  # Some objects have these textures as well.
)
# Training scenes use the left of every photograph, validation scenes the right. The numbers are
# fractions of its width and height: (x0, y0, x1, y1).
REGIONS = dict(train=(0.0, 0.0, 0.58, 1.0), val=(0.6, 0.0, 1.0, 1.0))
# Textures from a part of a photograph: the table top next to a cup of coffee, and lines of text.
CUTS = dict(
    wood=('coffee', dict(train=(0.0, 0.55, 0.14, 1.0), val=(0.84, 0.3, 1.0, 0.9))),
    text=('page', dict(train=(0.0, 0.15, 0.58, 0.68), val=(0.6, 0.15, 1.0, 0.68))),
)


def folder() -> Path:
    """Where scikit-image keeps its photographs. Raises RuntimeError without scikit-image."""
    spec = importlib.util.find_spec('skimage')
    if spec is None or spec.origin is None:
        raise RuntimeError(
            'scenes are made of the photographs that scikit-image ships, which is missing: '
            'run `pip install scikit-image`'
        )
    return Path(spec.origin).parent / 'data'


@functools.cache
def photograph(name: str) -> np.ndarray:
    """A photograph as (H, W, 3) RGB float32 in 0..1, at most 512 pixels high. Don't write to it."""
    path = folder() / FILES[name]
    if not path.is_file():
        raise RuntimeError(
            f'scikit-image has no {path.name} in {path.parent}: '
            'run `pip install --force-reinstall scikit-image`'
        )
    image = np.asarray(Image.open(path).convert('RGB'), dtype=np.float32) / 255
    if image.shape[0] <= 512:
        return image
    width = round(image.shape[1] * 512 / image.shape[0])
    return cv2.resize(image, (width, 512), interpolation=cv2.INTER_AREA)


@functools.cache
def texture(name: str, split: str) -> np.ndarray:
    """The part of a photograph, or of one of `CUTS`, for a split: (H, W, 3) RGB float32 in 0..1."""
    source, regions = CUTS.get(name, (name, REGIONS))
    image = photograph(source)
    x0, y0, x1, y1 = regions[split]
    height, width = image.shape[:2]
    return image[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)]


@functools.cache
def relief(name: str, split: str) -> np.ndarray:
    """The local contrast of a texture: (H, W) float32 with mean 0.5 and deviation 0.2."""
    grey = texture(name, split).mean(axis=2)
    grey = grey - cv2.GaussianBlur(grey, (0, 0), min(grey.shape) / 6)
    return (0.5 + 0.2 * grey / grey.std()).astype(np.float32)
