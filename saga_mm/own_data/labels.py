"""Looks at masks: which values they have, and which classes these stand for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..apis.pipeline import UNREADABLE
from ..transforms import IGNORED, decode_color, encode_colors, read_mask

# of a mask, more than that is a photograph, or lossy compression
MOST_VALUES = 256


@dataclass(frozen=True)
class Mask:
    """What a mask holds: the number of pixels of each value, or of each colour as a number."""

    height: int
    width: int
    pixels: Mapping[int, int]
    is_color: bool
    # the colour of each value, of an image with a palette
    palette: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Classes:
    """The classes of masks: their values, names and colours.

    With `is_plain`, the value is the number of the class, and 255 is ignored, which is what mmseg
    reads without a transform of ours.
    """

    values: tuple
    names: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]
    is_plain: bool


def look_at_mask(path: Path) -> Mask:
    """Read a mask.

    Raises:
        ValueError: It is broken, or it has more values than a mask can have.
    """
    try:
        mask = read_mask(path.read_bytes())
        with Image.open(path) as picture:
            colors = picture.getpalette() or [] if picture.mode == 'P' else []
    except UNREADABLE as error:
        raise ValueError(f'{type(error).__name__}: {error}') from error
    codes = encode_colors(mask) if mask.ndim == 3 else mask
    values, counts = np.unique(codes, return_counts=True)
    if len(values) > MOST_VALUES:
        kind = 'colours' if mask.ndim == 3 else 'values'
        raise ValueError(
            f'it has {len(values)} {kind}, and a mask has one for each class: save masks without '
            'lossy compression, as PNG, and without blending at borders'
        )
    palette = tuple(tuple(colors[i : i + 3]) for i in range(0, len(colors), 3))
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return Mask(mask.shape[0], mask.shape[1], pixels, mask.ndim == 3, palette)


def count_pixels(masks: Iterable[Mask]) -> Counter[int]:
    """The pixels of each value in all masks."""
    total: Counter[int] = Counter()
    for mask in masks:
        total.update(mask.pixels)
    return total


def choose_classes(
    masks: Sequence[Mask],
    names: Sequence[str] = (),
    ignore: Sequence[int | tuple[int, int, int]] = (),
) -> Classes:
    """Choose the classes that the values of masks stand for.

    Values from 0 without large gaps are numbers of classes, and 255 besides them is ignored. Other
    values, such as 0 and 255, and colours stand for a class each, in ascending order.

    Args:
        masks: Their values are either all numbers or all colours.
        names: Of the classes, in the order of their values.
        ignore: Values or colours of pixels that count for no class, beside 255.

    Raises:
        ValueError: There are no classes, too many of them, or another number of names.
    """
    found = sorted(set(count_pixels(masks)) - set(map(code_of, ignore)))
    is_color = masks[0].is_color
    counted = [value for value in found if is_color or value != IGNORED]
    # a few classes may be in no mask
    # one value besides 255 means masks of, for one, 0 and 255
    is_plain = len(counted) > 1 and not is_color and not ignore
    is_plain = is_plain and counted[0] >= 0 and counted[-1] < max(2 * len(counted), len(names))
    codes = list(range(max(counted[-1] + 1, len(names)))) if is_plain else found
    if len(codes) < 2:
        shown = _list(_value(code, is_color) for code in codes) or 'none'
        raise ValueError(f'masks must have two values or more that count, got {shown}')
    if len(codes) > IGNORED:
        raise ValueError(
            f'masks must have up to {IGNORED} classes, got {len(codes)} values: masks of objects, '
            'with a number for each, must be made masks of classes'
        )
    if names and len(names) != len(codes):
        raise ValueError(
            f'--classes or classes.txt must name each of {len(codes)} classes, got {len(names)}: '
            f'masks have the values {_list(_value(code, is_color) for code in codes)}'
        )
    values = tuple(_value(code, is_color) for code in codes)
    return Classes(values, _names(names, len(codes)), _palette(masks, values, is_color), is_plain)


def code_of(value: int | tuple[int, int, int]) -> int:
    """The number by which pixels of a class are counted."""
    return value if isinstance(value, int) else int(encode_colors(np.array(value)))


def _value(code: int, is_color: bool) -> int | tuple[int, int, int]:
    return decode_color(code) if is_color else code


def _names(names: Sequence[str], number: int) -> tuple[str, ...]:
    if not names and number == 2:
        names = 'background', 'foreground'
    return tuple(names) or tuple(f'class_{i}' for i in range(number))


def _palette(
    masks: Sequence[Mask], values: Sequence, is_color: bool
) -> tuple[tuple[int, ...], ...]:
    """The colours in the masks, or others that differ well."""
    if is_color:
        return tuple(values)
    stored = masks[0].palette
    if len(stored) > max(values) and len({stored[value] for value in values}) == len(values):
        return tuple(stored[value] for value in values)
    return distinct_colors(len(values), first_is_black=True)


def distinct_colors(number: int, first_is_black: bool = False) -> tuple[tuple[int, ...], ...]:
    """Colours as in the label maps of Pascal VOC.

    Args:
        number: How many, up to 256.
        first_is_black: Whether the first is black, as for a background.
    """
    colors = []
    for i in range(0 if first_is_black else 1, number + (0 if first_is_black else 1)):
        color = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                color[channel] |= (i >> (3 * bit + channel) & 1) << (7 - bit)
        colors.append(tuple(color))
    return tuple(colors)


def _list(values: Iterable[object], number: int = 12) -> str:
    shown = list(values)
    more = f' and {len(shown) - number} more' if len(shown) > number else ''
    return ', '.join(map(str, shown[:number])) + more
