"""Where sliding windows have borders, and whether these can be seen in a class map.

The border of a window is the line between two pixels, of which the window has only one. Where
windows overlap, mmseg adds up their logits, and every border of a window is one of the result.

Two measures show seams:

- edges: the share of neighbouring pixels on the two sides of a border that have different classes,
  next to that of all other neighbouring pixels. Objects have edges, too, but not more at borders.
- changes: the share of pixels near a border, and of pixels farther away, that get another class
  when the windows are placed elsewhere. Nothing in an image says where windows should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# Pixels up to so far from a border are near it.
NEAR = 16


class Window(NamedTuple):
    """Square windows in pixels, as in `test_cfg` of mmseg."""

    size: int
    stride: int

    def __str__(self) -> str:
        return f'{self.size}/{self.stride}'

    def spans(self, length: int) -> list[range]:
        """Where windows are along a side of an image, in mmseg's slide mode."""
        number = max(length - self.size + self.stride - 1, 0) // self.stride + 1
        stops = [min(i * self.stride + self.size, length) for i in range(number)]
        return [range(max(stop - self.size, 0), stop) for stop in stops]

    def moved_spans(self, length: int) -> list[range]:
        """The same windows where their borders are as far as possible from those of `spans`."""
        if length <= self.size:
            return self.spans(length)
        old = np.array(borders(self.spans(length)))

        def distance(spans: list[range]) -> int:
            return min(np.abs(old - line).min() for line in borders(spans))

        return max((self._starting(-shift, length) for shift in range(self.stride)), key=distance)

    def _starting(self, start: int, length: int) -> list[range]:
        """Windows from a start outside of the image; the first and the last one are cut to it."""
        last = length - self.size - start
        starts = range(start, length - self.size, self.stride)
        spans = [range(max(i, 0), i + self.size) for i in starts]
        return [*spans, range(min(starts[-1] + self.stride, last), length)]


def borders(spans: Iterable[range]) -> list[int]:
    """Where windows along a side start or end inside of the image."""
    spans = list(spans)
    ends = {end for span in spans for end in (span.start, span.stop)}
    return sorted(ends - {0, max(span.stop for span in spans)})


def edges(labels: np.ndarray, lines: Sequence[Sequence[int]]) -> dict[str, tuple[int, int]]:
    """Neighbouring pixels with different classes, and all of them: at borders, and elsewhere.

    Args:
        labels: (H, W).
        lines: The rows of horizontal borders, and the columns of vertical ones. Border i is between
            pixels i - 1 and i.
    """
    at, total_at, total, all_ = 0, 0, 0, 0
    for axis, places in enumerate(lines):
        across = np.moveaxis(labels, axis, 0)
        differ = across[1:] != across[:-1]
        chosen = differ[[place - 1 for place in places]]
        at, total_at = at + int(chosen.sum()), total_at + chosen.size
        total, all_ = total + int(differ.sum()), all_ + differ.size
    return dict(at=(at, total_at), elsewhere=(total - at, all_ - total_at))


def near_lines(shape: tuple[int, int], lines: Sequence[Sequence[int]]) -> np.ndarray:
    """A mask (H, W) of the pixels near borders of windows."""
    masks = []
    for length, places in zip(shape, lines, strict=True):
        mask = np.zeros(length, bool)
        for place in places:
            mask[max(0, place - NEAR) : place + NEAR] = True
        masks.append(mask)
    return masks[0][:, None] | masks[1]
