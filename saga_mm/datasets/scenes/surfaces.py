"""The surfaces of objects.

A surface is a function `(u, v, look) -> rgb`: coordinates as in `shapes`, the result (h, w, 3)
float32, about 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from . import photos


@dataclass(frozen=True)
class Look:
    """What a surface needs to know about its object.

    Args:
        rng: source of its random details.
        split: 'train' or 'val', which selects the part of the photographs to use.
        colour: (3,) RGB.
        light: (2,) direction towards the light, a unit vector in the object's frame.
        radius: pixels per unit of `u` and `v`.
    """

    rng: np.random.Generator
    split: str
    colour: np.ndarray
    light: np.ndarray
    radius: float

    def sample(self, name: str, u, v, density: float) -> np.ndarray:
        """Grey values of a texture from a random place: `density` texels per pixel."""
        image = photos.relief(name, self.split)
        x, y = self.rng.uniform(0, image.shape[1]), self.rng.uniform(0, image.shape[0])
        scale = self.radius * density
        return cv2.remap(
            image,
            (x + u * scale).astype(np.float32),
            (y + v * scale).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT_101,
        )

    def facing(self, u, v) -> np.ndarray:
        """Brightness of a slightly domed surface by its angle to the light: about 0.75..1.25."""
        return 1 + 0.25 * (u * self.light[0] + v * self.light[1])


def _paint(shade, colour):
    return shade[..., None] * colour


def glossy(u, v, look):
    """A shaded sphere with a highlight."""
    z = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
    lambert = np.clip(0.7 * (u * look.light[0] + v * look.light[1]) + 0.7 * z, 0, 1)
    highlight = np.clip((lambert - 0.93) / 0.07, 0, 1) ** 2
    return _paint(0.25 + 0.85 * lambert, look.colour) + 0.6 * highlight[..., None]


def masonry(u, v, look):
    """Bricks in courses with light mortar, and the grain of a photographed wall."""
    rows = look.rng.integers(3, 5)
    y = (v + 0.5) * rows
    row = np.floor(y)
    x = (u + 1) * rows * 0.5 + 0.5 * (row % 2)
    gap = np.minimum(0.5 - np.abs(y % 1 - 0.5), 2 * (0.5 - np.abs(x % 1 - 0.5)))
    mortar = np.clip(1.5 - gap * 2 * look.radius / rows, 0, 1)[..., None]
    shade = 0.75 + 0.12 * np.sin(12.9 * np.floor(x) + 78.2 * row)
    shade = (shade + 0.6 * (look.sample('brick', u, v, 0.8) - 0.5)) * look.facing(u, v)
    return (1 - mortar) * _paint(shade, look.colour) + mortar * np.float32([0.72, 0.7, 0.66])


def stripes(u, v, look):
    """Slanted stripes, white and one colour, on a rounded pole."""
    phase = (u + look.rng.uniform(0.5, 1.1) * v) * look.rng.uniform(3.0, 4.5)
    wave = np.sin(np.pi * phase) * look.radius / 14
    first = np.clip(0.5 + wave, 0, 1)[..., None]
    shade = (0.75 + 0.25 * np.cos(5 * v)) * look.facing(u, v)
    return shade[..., None] * (first * look.colour + (1 - first) * np.float32([0.95, 0.94, 0.9]))


def metal(u, v, look):
    """Brushed metal: bright and dark sectors around the centre."""
    angle = np.arctan2(v, u) - np.arctan2(look.light[1], look.light[0])
    shade = 0.62 + 0.3 * np.cos(2 * angle) + 0.08 * np.cos(np.hypot(u, v) * look.radius * 1.3)
    return _paint(shade, look.colour)


def tube(u, v, look):
    """A bent tube: bright along the middle of the ring, dark at its edges."""
    r = np.hypot(u, v)
    profile = np.clip(1 - ((r - 0.74) / 0.27) ** 2, 0, 1)
    lit = (u * look.light[0] + v * look.light[1]) / np.maximum(r, 1e-3)
    return _paint(0.3 + 0.6 * profile + 0.8 * lit * (r - 0.74), look.colour)


def foliage(u, v, look):
    """Veins at an angle to a midrib, over the grain of photographed grass."""
    veins = np.cos(look.rng.uniform(14, 20) * (u - 0.8 * np.abs(v)))
    midrib = np.clip(1.4 - np.abs(v) * look.radius / 1.2, 0, 1)
    shade = 0.72 + 0.1 * veins + 0.9 * (look.sample('grass', u, v, 1.0) - 0.5)
    return _paint(shade * look.facing(u, v), look.colour) + 0.3 * midrib[..., None]


def stone(u, v, look):
    """Photographed gravel, darker away from the light."""
    shade = 0.7 + 1.1 * (look.sample('gravel', u, v, 0.7) - 0.5)
    return _paint(shade * look.facing(1.6 * u, 1.6 * v), look.colour)


def planks(u, v, look):
    """Photographed wood, in boards, inside a darker frame."""
    boards = look.rng.integers(3, 5)
    y = (v + 0.8) * boards / 1.6
    seam = np.clip(1.3 - (0.5 - np.abs(y % 1 - 0.5)) * look.radius * 1.6 / boards, 0, 1)
    frame = np.clip((np.maximum(np.abs(u), np.abs(v)) - 0.55) * look.radius + 0.5, 0, 1)
    shade = 0.85 + 0.8 * (look.sample('wood', u, v, 0.6) - 0.5)
    shade = shade * look.facing(u, v) * (1 - 0.5 * seam * (1 - frame)) * (1 - 0.35 * frame)
    return _paint(shade, look.colour)


def print_(u, v, look):
    """Paper with photographed print."""
    margin = np.maximum(np.abs(u) / 0.62, np.abs(v) / 0.82) > 0.82
    text = np.clip(2.2 * look.sample('text', u, v, 1.0) - 0.1, 0.1, 1)
    return _paint(np.where(margin, 1.0, text) * look.facing(0.5 * u, 0.5 * v), look.colour)


def plain(u, v, look):
    """One colour, paler towards the middle."""
    shade = (1.05 - 0.3 * np.hypot(u, v)) * look.facing(u, v)
    return _paint(shade, look.colour)
