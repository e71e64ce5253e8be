"""Outlines, as signed distances.

A shape is a function `(u, v, rng) -> distance`: `u`, `v` are float32 coordinates in the object's
own frame, in units of its radius, the distance is in the same unit, negative inside. Its random
details come from `rng`, drawn in a fixed order. Every shape stays within 1.1 of the origin.
"""

from __future__ import annotations

import numpy as np


def disc(u, v, rng):
    return np.hypot(u, v) - 0.95


def _box(u, v, half_width, half_height):
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def bar(u, v, rng):
    return _box(u, v, 1.0, rng.uniform(0.13, 0.19))


def slab(u, v, rng):
    return _box(u, v, 0.95, rng.uniform(0.42, 0.55))


def square(u, v, rng):
    return _box(u, v, 0.76, rng.uniform(0.66, 0.8))


def sheet(u, v, rng):
    return _box(u, v, 0.62, rng.uniform(0.75, 0.9))


def ring(u, v, rng):
    return np.abs(np.hypot(u, v) - 0.74) - rng.uniform(0.18, 0.25)


def leaf(u, v, rng):
    half_width = rng.uniform(0.36, 0.5)
    radius = (1 + half_width**2) / (2 * half_width)
    offset = radius - half_width
    return np.maximum(np.hypot(u, v - offset), np.hypot(u, v + offset)) - radius


def gear(u, v, rng):
    teeth = rng.integers(8, 13)
    angle = np.arctan2(v, u)
    tooth = np.clip(1.8 * np.cos(teeth * angle) + 0.5, 0, 1)
    r = np.hypot(u, v)
    return np.maximum(r - 0.78 - 0.22 * tooth, rng.uniform(0.2, 0.32) - r)


def crescent(u, v, rng):
    return np.maximum(np.hypot(u, v) - 1, 0.8 - np.hypot(u - rng.uniform(0.4, 0.55), v))


def cross(u, v, rng):
    arm = rng.uniform(0.24, 0.34)
    return np.minimum(_box(u, v, 0.95, arm), _box(u, v, arm, 0.95))


def _polygon(u, v, corners):
    """Signed distance to a simple polygon, corners (n, 2)."""
    squared = np.full_like(u, np.inf)
    inside = np.zeros(u.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = u - ax, v - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        inside ^= ((v >= ay) != (v >= by)) & ((ex * wy < ey * wx) == (by > ay))
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _around(radii, angles):
    corners = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
    return corners.astype(np.float32)


def star(u, v, rng):
    radii = np.tile([1.0, rng.uniform(0.4, 0.5)], 5)
    return _polygon(u, v, _around(radii, np.arange(10) * np.pi / 5))


def rock(u, v, rng):
    n = rng.integers(7, 10)
    angles = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
    return _polygon(u, v, _around(rng.uniform(0.72, 1.0, n), angles))


def triangle(u, v, rng):
    radii = rng.uniform(0.85, 1.05, 3)
    return _polygon(u, v, _around(radii, np.arange(3) * 2 * np.pi / 3))
