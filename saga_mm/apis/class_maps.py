"""Describes maps of classes, and writes them as image files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoint import write_atomically

TIFF_SUFFIXES = ('.tif', '.tiff')
# Tags of GeoTIFF: scale, tie points and transformation of the pixels, and three tags of keys.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)


def class_map_path(path: Path, image: Path) -> Path:
    """The file for the class map of an image: `path` as a TIFF file for a TIFF image, else as PNG.

    Raises:
        ValueError: The image is a TIFF file, and tifffile is not installed.
    """
    if image.suffix.lower() not in TIFF_SUFFIXES:
        return path.with_suffix('.png')
    if find_spec('tifffile') is None:
        raise ValueError(
            'class maps of TIFF images need tifffile, which keeps their georeferencing: '
            'pip install tifffile'
        )
    return path.with_suffix('.tif')


def write_class_map(
    path: Path, labels: np.ndarray, palette: Sequence[Sequence[int]], image: Path
) -> None:
    """Write a map of classes, whose pixels have the number of their class as their value.

    With up to 256 classes, the file has a palette, so that it is shown in the colours of the
    classes. A TIFF file gets the georeferencing of its image.

    Args:
        path: From `class_map_path`.
        labels: (H, W), uint8, or int16 for more classes.
        palette: The colour of each class, RGB from 0 to 255.
        image: The file that the classes are of.

    Raises:
        OSError: `path` can't be written; it is as it was.
    """
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = np.array(palette[:256], np.uint8).reshape(-1, 3)
    encode = encode_tiff if path.suffix in TIFF_SUFFIXES else encode_png
    write_atomically(path, encode(labels, colors, image))


def encode_png(labels: np.ndarray, colors: np.ndarray, image: Path) -> bytes:
    if labels.dtype == np.uint8:
        picture = Image.fromarray(labels)
        picture.putpalette(colors.tobytes())
    else:
        picture = Image.fromarray(labels.astype(np.uint16))
    file = io.BytesIO()
    picture.save(file, 'png')
    return file.getvalue()


def encode_tiff(labels: np.ndarray, colors: np.ndarray, image: Path) -> bytes:
    import tifffile

    with tifffile.TiffFile(image) as source:
        found = source.pages.first.tags
        tags = [found[code] for code in GEO_TAGS if code in found]
    options: dict[str, Any] = dict(photometric='minisblack')
    if labels.dtype == np.uint8:
        # 16 bits per colour
        options = dict(photometric='palette', colormap=colors.T.astype(np.uint16) * 257)
    file = io.BytesIO()
    tifffile.imwrite(
        file,
        labels if labels.dtype == np.uint8 else labels.astype(np.uint16),
        tile=(512, 512),
        compression='zlib',
        metadata=None,
        extratags=[(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags],
        **options,
    )
    return file.getvalue()


def legend(labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    """A line for each class that a map has: number, name, colour, pixels and share."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    width = max(map(len, classes))
    lines = []
    for label in np.argsort(-counts, kind='stable'):
        if counts[label]:
            color = '#' + ''.join(f'{value:02x}' for value in palette[label])
            share = 100 * counts[label] / labels.size
            name = f'{label:4d}  {classes[label].strip():{width}}'
            lines.append(f'{name}  {color}  {counts[label]:12,d} pixels  {share:5.1f} %')
    return '\n'.join(lines)
