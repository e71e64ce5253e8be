"""The appearance of a class: a shape, a surface, and ranges of colour and size."""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from . import shapes, surfaces


@dataclass(frozen=True)
class Kind:
    """The appearance of a class.

    Ranges are (low, high). The hue is in turns, and the radius is a fraction of the image's shorter
    side.
    """

    shape: Callable
    surface: Callable
    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]
    radius: tuple[float, float] = (0.14, 0.34)

    def colour(self, rng: np.random.Generator) -> np.ndarray:
        """A colour of this kind: (3,) float32 RGB."""
        hue, saturation, value = (
            rng.uniform(*limits) for limits in (self.hue, self.saturation, self.value)
        )
        return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


# Hues overlap between kinds and occur in backgrounds, so colour alone does not identify a class.
KINDS = dict(
    ball=Kind(shapes.disc, surfaces.glossy, (0.8, 0.97), (0.55, 0.95), (0.6, 1.0)),
    brick=Kind(shapes.slab, surfaces.masonry, (-0.02, 0.06), (0.45, 0.75), (0.6, 0.95)),
    pole=Kind(
        shapes.bar, surfaces.stripes, (-0.05, 0.05), (0.7, 1.0), (0.5, 0.9), radius=(0.28, 0.55)
    ),
    star=Kind(shapes.star, surfaces.plain, (0.08, 0.17), (0.6, 1.0), (0.8, 1.0)),
    ring=Kind(shapes.ring, surfaces.tube, (0.45, 0.62), (0.3, 0.9), (0.7, 1.0)),
    leaf=Kind(shapes.leaf, surfaces.foliage, (0.2, 0.38), (0.5, 0.9), (0.55, 0.95)),
    gear=Kind(shapes.gear, surfaces.metal, (0.62, 0.85), (0.15, 0.5), (0.7, 1.0)),
    rock=Kind(shapes.rock, surfaces.stone, (0.04, 0.12), (0.05, 0.3), (0.6, 1.0)),
    crate=Kind(shapes.square, surfaces.planks, (0.05, 0.11), (0.45, 0.75), (0.6, 0.95)),
    page=Kind(shapes.sheet, surfaces.print_, (0.05, 0.6), (0.0, 0.2), (0.85, 1.0)),
)

_SHAPES = (
    (shapes.disc, shapes.bar, shapes.slab, shapes.square, shapes.ring, shapes.leaf)
    + (shapes.gear, shapes.crescent, shapes.cross, shapes.star, shapes.rock, shapes.triangle)
)  # fmt: skip
_SURFACES = (
    (surfaces.plain, surfaces.stone, surfaces.stripes, surfaces.masonry, surfaces.glossy)
    + (surfaces.foliage, surfaces.planks)
)  # fmt: skip


def derived_kinds(n: int) -> list[Kind]:
    """`n` kinds that differ in shape, surface or hue.

    12 and 7 have no common factor, so the 12 shapes and 7 surfaces give 84 pairs before one is
    repeated, with another hue.
    """
    kinds = []
    for i in range(n):
        hue = i * 0.618 + i // (len(_SHAPES) * len(_SURFACES)) * 0.5
        shape, surface = _SHAPES[i % len(_SHAPES)], _SURFACES[i % len(_SURFACES)]
        radius = (0.25, 0.5) if shape is shapes.bar else (0.14, 0.34)
        kinds.append(Kind(shape, surface, (hue - 0.04, hue + 0.04), (0.4, 0.9), (0.6, 1.0), radius))
    return kinds
