"""Describes maps of classes, and writes them as image files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..checkpoint import write_atomically
from ..checkpoint.files import open_atomically

TIFF_SUFFIXES = ('.tif', '.tiff')
# Tags of GeoTIFF: scale, tie points and transformation of the pixels, and three tags of keys.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
# Keys of GeoTIFF: the kind of coordinates, where 1 is projected, the projection, and its unit.
MODEL, PROJECTION, LINEAR_UNIT, PROJECTED = 1024, 3072, 3076, 1
# Metres of units, by their codes: metre, foot, foot of US surveys.
METRES = {9001: 1.0, 9002: 0.3048, 9003: 1200 / 3937}
# Codes of the zones of UTM, in metres: on WGS 84 in the north and in the south, ETRS89, and NAD83.
UTM = (range(32601, 32661), range(32701, 32761), range(25828, 25839), range(26901, 26924))
# Pixels on a side of the tiles of a file.
TILE = 512


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


def is_streamed(path: Path) -> bool:
    """Whether a class map is written as its rows come, and never exists as a whole."""
    return path.suffix in TIFF_SUFFIXES


def write_class_map(
    path: Path,
    parts: Iterable[np.ndarray],
    shape: tuple[int, int],
    dtype: type[np.unsignedinteger],
    palette: Sequence[Sequence[int]],
    image: Path,
) -> None:
    """Write a map of classes, whose pixels have the number of their class as their value.

    With up to 256 classes, the file has a palette, so that it is shown in the colours of the
    classes. A TIFF file gets the georeferencing of its image, and is written tile by tile.

    Args:
        path: From `class_map_path`.
        parts: The classes, row by row: (rows, W) each, of integers.
        shape: (H, W).
        dtype: Of the file: uint8, or uint16 for more classes.
        palette: The colour of each class, RGB from 0 to 255.
        image: The file that the classes are of.

    Raises:
        OSError: `path` can't be written; it is as it was.
    """
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(palette)] = np.array(palette[:256], np.uint8).reshape(-1, 3)
    if not is_streamed(path):
        labels, start = np.empty(shape, dtype), 0
        for part in parts:
            labels[start : start + len(part)] = part
            start += len(part)
        write_atomically(path, encode_png(labels, colors))
        return
    try:
        with open_atomically(path) as file:
            write_tiff(file, parts, shape, dtype, colors, image)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def encode_png(labels: np.ndarray, colors: np.ndarray) -> bytes:
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(colors.tobytes())
    file = io.BytesIO()
    picture.save(file, 'png')
    return file.getvalue()


def write_tiff(
    file: BinaryIO,
    parts: Iterable[np.ndarray],
    shape: tuple[int, int],
    dtype: type[np.unsignedinteger],
    colors: np.ndarray,
    image: Path,
) -> None:
    import tifffile

    with tifffile.TiffFile(image) as source:
        found = source.pages.first.tags
        tags = [found[code] for code in GEO_TAGS if code in found]
        # a long value is read here
        extra = [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags]
    options: dict[str, Any] = dict(photometric='minisblack')
    if dtype is np.uint8:
        # 16 bits per colour
        options = dict(photometric='palette', colormap=colors.T.astype(np.uint16) * 257)
    tifffile.imwrite(
        file,
        tiles(parts, shape[1], dtype),
        shape=shape,
        dtype=dtype,
        tile=(TILE, TILE),
        compression='zlib',
        metadata=None,
        extratags=extra,
        **options,
    )


def tiles(
    parts: Iterable[np.ndarray], width: int, dtype: type[np.unsignedinteger]
) -> Iterator[np.ndarray]:
    """The tiles of a map of this width, row by row; the last ones are filled up with zeros."""
    lefts = range(0, width, TILE)
    rows, filled = np.zeros((TILE, TILE * len(lefts)), dtype), 0
    for part in parts:
        start = 0
        while start < len(part):
            number = min(TILE - filled, len(part) - start)
            rows[filled : filled + number, :width] = part[start : start + number]
            start, filled = start + number, filled + number
            if filled == TILE:
                yield from (rows[:, left : left + TILE].copy() for left in lefts)
                rows, filled = np.zeros_like(rows), 0
    if filled:
        yield from (rows[:, left : left + TILE].copy() for left in lefts)


def pixel_area(image: Path) -> float | None:
    """Square metres that a pixel of an image covers on the ground.

    It is known for a GeoTIFF file in a projection whose unit is named, or that is a zone of UTM,
    and None for any other file. Projections stretch areas a little.
    """
    if image.suffix.lower() not in TIFF_SUFFIXES or find_spec('tifffile') is None:
        return None
    import tifffile

    with tifffile.TiffFile(image) as source:
        found = source.pages.first.tags
        tags = {code: found[code].value for code in GEO_TAGS if code in found}
    scale, transformation, keys = (tags.get(code, ()) for code in (33550, 34264, 34735))
    # four numbers for each key: its code, where its value is (0: here), their number, the value
    values = {keys[i]: keys[i + 3] for i in range(4, len(keys) - 3, 4) if keys[i + 1] == 0}
    unit = METRES.get(values.get(LINEAR_UNIT, 0))
    if LINEAR_UNIT not in values and any(values.get(PROJECTION) in zones for zones in UTM):
        unit = 1.0
    if unit is None or values.get(MODEL, PROJECTED) != PROJECTED:
        return None
    if len(scale) >= 2:
        return abs(scale[0] * scale[1]) * unit**2
    if len(transformation) == 16:
        a, b, _, _, c, d = transformation[:6]
        return abs(a * d - b * c) * unit**2
    return None


def legend(
    counts: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    pixel_area: float | None = None,
) -> str:
    """A line for each class that a map has: number, name, colour, pixels, share and area.

    Args:
        counts: The pixels of each class.
        classes: The names of the classes.
        palette: The colour of each class, RGB from 0 to 255.
        pixel_area: Square metres of a pixel. Defaults to None, for lines without an area.
    """
    width = max(map(len, classes))
    lines = []
    for label in np.argsort(-counts, kind='stable'):
        if counts[label]:
            color = '#' + ''.join(f'{value:02x}' for value in palette[label])
            share = 100 * counts[label] / counts.sum()
            name = f'{label:4d}  {classes[label].strip():{width}}'
            line = f'{name}  {color}  {counts[label]:12,d} pixels  {share:5.1f} %'
            if pixel_area is not None:
                line += f'  {in_square_metres(counts[label] * pixel_area)}'
            lines.append(line)
    return '\n'.join(lines)


def in_square_metres(area: float) -> str:
    return f'{area:,.1f} m2' if area < 1e6 else f'{area / 1e6:,.3f} km2'
