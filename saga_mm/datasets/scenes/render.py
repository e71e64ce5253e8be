"""Renders one scene: background, distractors, objects that occlude each other, camera effects.

Legend: `H`, `W` image rows and columns; images are (H, W, 3) RGB float32, about 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from . import photos
from .kinds import Kind
from .surfaces import Look

OBJECTS_PER_SCENE = (5, 11)  # minimum, and one more than the maximum
MIN_VISIBLE = 0.0012  # fraction of the image's area
MIN_VISIBLE_PART = 0.3  # fraction of the object's area inside the image


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Args:
        image: (H, W, 3) RGB uint8.
        masks: one (H, W) bool per object: its visible pixels. They don't overlap.
        labels: the index of each object's kind.
    """

    image: np.ndarray
    masks: list[np.ndarray]
    labels: list[int]


@dataclass(frozen=True)
class _Sprite:
    label: int
    window: tuple[slice, slice]
    alpha: np.ndarray
    rgb: np.ndarray
    shadow: tuple[float, float]


def deal(n_scenes: int, n_kinds: int, rng: np.random.Generator) -> list[list[int]]:
    """The kinds of objects in each scene; all kinds occur about equally often.

    Scenes draw from shuffled decks of all kinds, one deck after another.
    """
    counts = rng.integers(*OBJECTS_PER_SCENE, size=n_scenes)
    decks = -(-int(counts.sum()) // n_kinds)
    cards = np.concatenate([rng.permutation(n_kinds) for _ in range(decks)])
    return [hand.tolist() for hand in np.split(cards, np.cumsum(counts))[:n_scenes]]


def render(
    kinds: Sequence[Kind],
    labels: Sequence[int],
    split: str,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Scene:
    """Render a scene with objects of the given kinds, the first in front.

    An object of which too little would be visible is left out.

    Args:
        kinds: what the classes look like.
        labels: indices into `kinds`.
        split: 'train' or 'val': which part of the photographs it is made of.
        size: (H, W).
        rng: the only source of randomness.
    """
    image = _background(split, size, rng)
    _distract(image, split, rng)
    towards = rng.uniform(0, 2 * np.pi)
    light = np.array([np.cos(towards), np.sin(towards)], dtype=np.float32)
    sprites = [_sprite(kinds[label], label, split, size, light, rng) for label in labels]
    sprites, masks = _visible(sprites, size)
    softness, strength = rng.uniform(0.01, 0.025) * min(size), rng.uniform(0.2, 0.55)
    for sprite in reversed(sprites):
        _cast_shadow(image, sprite, softness, strength)
        alpha = sprite.alpha[..., None]
        image[sprite.window] = (1 - alpha) * image[sprite.window] + alpha * sprite.rgb
    return Scene(_photograph(image, light, rng), masks, [sprite.label for sprite in sprites])


def _crop(image, height, width, zoom, rng):
    """A random crop, perhaps mirrored, resized to (height, width).

    `zoom` is the fraction of the photograph's width or height that the crop takes, for the side
    that limits the crop.
    """
    rows, columns = image.shape[:2]
    scale = zoom * min(rows / height, columns / width)
    h, w = max(1, int(height * scale)), max(1, int(width * scale))
    y, x = rng.integers(0, rows - h + 1), rng.integers(0, columns - w + 1)
    crop = image[y : y + h, x : x + w]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    shrinks = h > height
    return cv2.resize(
        crop, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )


def _background(split, size, rng):
    name = photos.BACKGROUNDS[rng.integers(len(photos.BACKGROUNDS))]
    image = _crop(photos.texture(name, split), *size, rng.uniform(0.5, 1.0), rng)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 2.0) * min(size) / 192)
    haze = np.float32(rng.uniform(0.1, 0.5))
    image = (1 - haze) * image + haze * np.float32(rng.uniform(0.2, 0.7, 3))
    return image * np.float32(rng.uniform(0.6, 1.0))


def _distract(image, split, rng):
    """Draw unlabelled clutter under the objects: parts of photographs, blurred spots, wires."""
    height, width = image.shape[:2]
    unit = min(height, width)
    for _ in range(rng.integers(0, 3)):
        h, w = (int(rng.uniform(0.1, 0.35) * unit) + 1 for _ in range(2))
        name = photos.BACKGROUNDS[rng.integers(len(photos.BACKGROUNDS))]
        snippet = _crop(photos.texture(name, split), h, w, rng.uniform(0.2, 0.7), rng)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        image[y : y + h, x : x + w] = snippet
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    for _ in range(rng.integers(0, 3)):
        r = rng.uniform(0.05, 0.2) * unit
        y, x = rng.uniform(0, height), rng.uniform(0, width)
        alpha = rng.uniform(0.2, 0.7) * np.exp(-(((rows - y) ** 2 + (columns - x) ** 2) / r**2))
        image += alpha[..., None] * (np.float32(rng.uniform(0, 1, 3)) - image)
    for _ in range(rng.integers(0, 3)):
        ends = rng.uniform(-0.1, 1.1, (4, 2)) * (width, height)
        t = np.linspace(0, 1, 40)[:, None]
        curve = (1 - t) ** 3 * ends[0] + 3 * (1 - t) ** 2 * t * ends[1]
        curve += 3 * (1 - t) * t**2 * ends[2] + t**3 * ends[3]
        thickness = max(1, round(rng.uniform(0.005, 0.02) * unit))
        colour = rng.uniform(0, 1, 3).tolist()
        points = np.round(curve).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(image, [points], False, colour, thickness)


def _sprite(kind, label, split, size, light, rng):
    """An object with random place, angle and size, whose centre is inside the image."""
    height, width = size
    low, high = np.log(kind.radius)
    radius = float(np.exp(rng.uniform(low, high))) * min(size)
    y, x = rng.uniform(0, height), rng.uniform(0, width)
    angle = rng.uniform(0, 2 * np.pi)
    reach = 1.12 * radius + 1
    top, left = max(0, int(y - reach)), max(0, int(x - reach))
    window = (
        slice(top, min(height, int(y + reach) + 1)),
        slice(left, min(width, int(x + reach) + 1)),
    )
    rows, columns = np.mgrid[window].astype(np.float32) + np.float32(0.5)
    turn = np.float32([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    dx, dy = (columns - np.float32(x)) / radius, (rows - np.float32(y)) / radius
    u, v = turn[0, 0] * dx + turn[0, 1] * dy, turn[1, 0] * dx + turn[1, 1] * dy
    alpha = np.clip(0.5 - kind.shape(u, v, rng) * radius, 0, 1).astype(np.float32)
    look = Look(rng, split, kind.colour(rng), turn @ light, radius)
    rgb = kind.surface(u, v, look).astype(np.float32)
    offset = -light * rng.uniform(0.08, 0.25) * radius
    return _Sprite(label, window, alpha, rgb, (float(offset[0]), float(offset[1])))


def _visible(sprites, size):
    """The objects of which enough is visible, from front to back, and their visible pixels."""
    taken = np.zeros(size, dtype=bool)
    kept, masks = [], []
    for sprite in sprites:
        mask = np.zeros(size, dtype=bool)
        mask[sprite.window] = sprite.alpha > 0.5
        whole = mask.sum()
        mask &= ~taken
        if mask.sum() < max(MIN_VISIBLE * taken.size, MIN_VISIBLE_PART * whole, 1):
            continue
        taken |= mask
        kept.append(sprite)
        masks.append(mask)
    return kept, masks


def _cast_shadow(image, sprite, softness, strength):
    height, width = image.shape[:2]
    shadow = np.zeros((height, width), dtype=np.float32)
    shadow[sprite.window] = sprite.alpha
    shift = np.float32([[1, 0, sprite.shadow[0]], [0, 1, sprite.shadow[1]]])
    shadow = cv2.warpAffine(shadow, shift, (width, height))
    shadow = cv2.GaussianBlur(shadow, (0, 0), softness)
    image *= 1 - strength * shadow[..., None]


def _photograph(image, light, rng):
    """Uneven lighting, white balance, gamma, blur and noise: the scene as (H, W, 3) uint8."""
    height, width = image.shape[:2]
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope = np.float32(rng.uniform(0, 0.25))
    image *= (1 + slope * (columns * light[0] + rows * light[1]))[..., None]
    image *= np.float32(rng.uniform(0.92, 1.08, 3) * rng.uniform(0.75, 1.15))
    image = np.clip(image, 0, 1) ** np.float32(rng.uniform(0.8, 1.25))
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.0) * min(height, width) / 192)
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    image += noise * np.float32(rng.uniform(0.0, 0.035))
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
