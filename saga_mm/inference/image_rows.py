"""An image whose rows are made when they are read, so that it never exists as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Bytes of the rows that are read at a time to make a whole image.
PART = 2**24


class ImageRows:
    """An image (B, H, W, C), of which `image[:, start:stop]` makes some rows.

    Args:
        shape: (B, H, W, C).
        read: Makes rows of the image from their range, as (B, C, rows, W).
    """

    def __init__(self, shape: Sequence[int], read: Callable[[range], Tensor]) -> None:
        self.shape = torch.Size(shape)
        self.read = read

    @classmethod
    def of(cls, image: Tensor) -> ImageRows:
        """The rows of an image (B, C, H, W) that is there."""
        batch, channels, height, width = image.shape
        return cls(
            (batch, height, width, channels),
            lambda rows: image[:, :, rows.start : rows.stop],
        )

    def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
        batch, rows = key
        return self.read(range(*rows.indices(self.shape[1])))[batch].permute(0, 2, 3, 1)

    def channels(self, chosen: slice) -> ImageRows:
        """Some of its channels."""
        number = len(range(*chosen.indices(self.shape[-1])))
        return ImageRows((*self.shape[:-1], number), lambda rows: self.read(rows)[:, chosen])

    def whole(self) -> Tensor:
        """The image, (B, C, H, W)."""
        batch, height, width, channels = self.shape
        first = self.read(range(1))
        image = first.new_empty((batch, channels, height, width))
        step = max(1, PART // first.nbytes)
        for start in range(0, height, step):
            rows = range(start, min(start + step, height))
            image[:, :, rows.start : rows.stop] = self.read(rows)
        return image
