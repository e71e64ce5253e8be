"""A mask as COCO polygons that rasterise back to exactly that mask."""

from __future__ import annotations

import cv2
import numpy as np


def polygons(mask: np.ndarray) -> list[list[int]]:
    """Outlines of a mask along the edges of its pixels.

    COCO polygons can't have holes, so a part with a hole is divided in two through the hole, and
    each half gets its own outline.

    Args:
        mask: (H, W) bool.

    Returns:
        One flat list x0, y0, x1, y1, ... per outline, in COCO's coordinates: pixel (column, row)
        covers [column, column + 1] x [row, row + 1].
    """
    # At twice the size, the centre of each pixel of a contour is a quarter of an original pixel
    # away from the corner that it represents.
    doubled = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for i, contour in enumerate(contours):
        is_hole = hierarchy[0, i, 3] >= 0
        if is_hole:
            points = contour[:, 0, 0]
            cut = (int(points.min()) + int(points.max()) + 2) // 4
            left, right = mask.copy(), mask.copy()
            left[:, cut:] = False
            right[:, :cut] = False
            return polygons(left) + polygons(right)
    return [_corners(contour[:, 0]) for contour in contours]


def _corners(points: np.ndarray) -> list[int]:
    corners = (points + 1) // 2
    repeated = (corners == np.roll(corners, 1, axis=0)).all(axis=1)
    return corners[~repeated].ravel().tolist()
