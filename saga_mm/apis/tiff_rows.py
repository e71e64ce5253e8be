"""Reads 8-bit TIFF images row by row, with the values that OpenCV gives for the whole image."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Compressions that give back what was compressed: none, LZW, Deflate, PackBits, old Deflate.
LOSSLESS = (1, 5, 8, 32773, 32946)
GREY, RGB = 1, 2
# what reading a damaged file may raise
BROKEN = (
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class TiffRows:
    """An image (3, H, W), uint8, BGR, of which `image[:, start:stop]` reads some rows.

    The tiles or strips that hold the rows which were read last stay in memory.

    Args:
        path (str | os.PathLike): A TIFF file, whose first page is read.

    Attributes:
        shape (torch.Size): (3, H, W).
        dtype (torch.dtype): uint8.

    Raises:
        ValueError: The file has another format; the message says which.
        ImportError: tifffile is not installed.
    """

    dtype = torch.uint8

    def __init__(self, path: str | os.PathLike) -> None:
        import tifffile

        try:
            self.file = tifffile.TiffFile(Path(path))
        except (tifffile.TiffFileError, *BROKEN) as error:
            raise ValueError(str(error)) from error
        try:
            self._open()
        except (tifffile.TiffFileError, *BROKEN) as error:
            self.close()
            raise ValueError(str(error)) from error

    def _open(self) -> None:
        page = self.page = self.file.pages.first
        bands, colors = page.samplesperpixel, int(page.photometric)
        orientation = page.tags.get('Orientation')
        if page.dtype != np.uint8 or page.bitspersample != 8:
            raise ValueError(f'it has {page.bitspersample} bits per value')
        if (bands, colors) not in ((1, GREY), (3, RGB)) or page.imagedepth > 1:
            raise ValueError(f'it has {bands} bands of {page.photometric!r}')
        if bands > 1 and page.planarconfig != 1:
            raise ValueError('its bands are one after the other')
        if page.compression not in LOSSLESS:
            raise ValueError(f'it has {page.compression!r}')
        if orientation is not None and orientation.value != 1:
            raise ValueError(f'its orientation is {orientation.value}')
        self.shape = torch.Size((3, page.imagelength, page.imagewidth))
        self.height = page.tilelength if page.is_tiled else page.rowsperstrip
        self.height = min(self.height, page.imagelength)
        self.across = -(-page.imagewidth // page.tilewidth) if page.is_tiled else 1
        self.mapped = None
        if page.is_memmappable:
            self.mapped = np.memmap(
                self.file.filehandle.path,
                mode='r',
                offset=page.dataoffsets[0],
                shape=(page.imagelength, page.imagewidth, bands),
            )
        self.blocks: dict[int, np.ndarray] = {}
        # raises an error if a package for its compression is missing
        self[:, :1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | tuple[slice, slice]) -> Tensor:
        channels, rows = key if isinstance(key, tuple) else (key, slice(None))
        start, stop, _ = rows.indices(self.shape[1])
        if self.mapped is not None:
            pixels = np.array(self.mapped[start:stop])
        else:
            first, last = start // self.height, -(-stop // self.height)
            try:
                self.blocks = {
                    i: self.blocks[i] if i in self.blocks else self._decode(i)
                    for i in range(first, last)
                }
            except BROKEN as error:
                raise ValueError(f'not readable as an image: {error}') from error
            found = list(self.blocks.values()) or [np.empty((0, *self.shape[2:], 3), np.uint8)]
            joined = np.concatenate(found) if len(found) > 1 else found[0]
            pixels = joined[start - first * self.height : stop - first * self.height]
        bgr = np.broadcast_to(pixels[..., ::-1], (*pixels.shape[:2], 3)).transpose(2, 0, 1)
        return torch.from_numpy(bgr.copy())[channels]

    def _decode(self, block: int) -> np.ndarray:
        """A row of tiles, or a strip: (rows, W, bands)."""
        height = min(self.height, self.shape[1] - block * self.height)
        pixels = np.zeros((height, self.shape[2], self.page.samplesperpixel), np.uint8)
        for column in range(self.across):
            index = block * self.across + column
            self.file.filehandle.seek(self.page.dataoffsets[index])
            size = self.page.databytecounts[index]
            data = self.file.filehandle.read(size)
            if len(data) < size:
                raise ValueError('the file is not complete')
            # a tile of no bytes has no values, and is black
            part = self.page.decode(data, index)[0] if data else None
            if part is not None:
                left = column * self.page.tilewidth
                part = part[0, :height, : self.shape[2] - left]
                pixels[: part.shape[0], left : left + part.shape[1]] = part
        return pixels

    def close(self) -> None:
        self.file.close()
