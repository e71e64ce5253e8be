"""Transforms that load and crop what those of mmcv, mmdet and mmseg do not."""

from __future__ import annotations

from collections.abc import Sequence

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine import fileio

from .registry import TRANSFORMS

# of a pixel that counts for no class
IGNORED = 255


@TRANSFORMS.register_module()
class LoadBands(LoadImageFromFile):
    """Loads a TIFF file of any number of bands and of any depth, with the bands last.

    The bands of a file may come first, last, or as a page each. Needs tifffile.

    Args:
        ignore_empty (bool): Whether to skip an image that can't be read. Defaults to False.
        backend_args (dict, optional): mmengine's file backend. Defaults to None.
    """

    def __init__(self, ignore_empty: bool = False, backend_args: dict | None = None) -> None:
        super().__init__(
            to_float32=True,
            color_type='unchanged',
            imdecode_backend='tifffile',
            ignore_empty=ignore_empty,
            backend_args=backend_args,
        )

    def transform(self, results: dict) -> dict | None:
        """Add `img` (H, W, bands), float32, and its size to the results."""
        loaded = super().transform(results)
        if loaded is not None:
            loaded['img'] = bands_last(loaded['img'])
            loaded['img_shape'] = loaded['ori_shape'] = loaded['img'].shape[:2]
        return loaded


def bands_last(image: np.ndarray) -> np.ndarray:
    """An image (H, W), (H, W, bands) or (bands, H, W) as (H, W, bands)."""
    if image.ndim == 3 and image.shape[0] < min(image.shape[1:]):
        image = np.moveaxis(image, 0, -1)
    return np.ascontiguousarray(np.atleast_3d(image))


@TRANSFORMS.register_module()
class LoadLabelMap(LoadAnnotations):
    """Loads a mask whose classes have any values, such as 0 and 255, or any colours.

    Args:
        values (Sequence): Of each class, its value in the mask, or its colour (red, green, blue).
            Pixels with another are ignored: they become 255.
        backend_args (dict, optional): mmengine's file backend. Defaults to None.

    Raises:
        ValueError: `values` are neither all numbers nor all colours, or one of them is there twice,
            or there are more than 255.
    """

    def __init__(
        self,
        values: Sequence[int] | Sequence[Sequence[int]],
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(
            with_bbox=False, with_label=False, with_seg=True, backend_args=backend_args
        )
        numbers = np.array(values, np.int64) if len({np.shape(v) for v in values}) == 1 else None
        if numbers is None or numbers.shape[1:] not in ((), (3,)):
            raise ValueError(f'values must be numbers, or colours of 3 numbers, got {values!r}')
        self.is_color = numbers.ndim == 2
        self.codes = encode_colors(numbers) if self.is_color else numbers
        if len(set(self.codes.tolist())) < len(values) or len(values) > IGNORED:
            raise ValueError(f'values must differ, and be up to {IGNORED}, got {values!r}')

    def _load_seg_map(self, results: dict) -> None:
        mask = read_mask(fileio.get(results['seg_map_path'], backend_args=self.backend_args))
        if self.is_color != (mask.ndim == 3):
            kinds = {False: 'one channel', True: 'colours'}
            raise ValueError(
                f'{results["seg_map_path"]} has {kinds[mask.ndim == 3]}, and values of '
                f'{kinds[self.is_color]} are expected'
            )
        codes = encode_colors(mask) if self.is_color else mask
        order = np.argsort(self.codes)
        place = order[np.searchsorted(self.codes, codes, sorter=order).clip(0, len(order) - 1)]
        labels = np.where(self.codes[place] == codes, place, IGNORED)
        results['gt_seg_map'] = labels.astype(np.uint8)
        results['ignore_index'] = IGNORED
        results.setdefault('seg_fields', []).append('gt_seg_map')


def read_mask(data: bytes) -> np.ndarray:
    """A mask as mmseg reads it: (H, W), or (H, W, 3) in red, green, blue if it has colours.

    The value of a pixel of an image with a palette is its number in the palette.
    """
    mask = np.asarray(mmcv.imfrombytes(data, flag='unchanged', backend='pillow'))
    if mask.ndim == 3 and mask.shape[2] == 2:
        mask = mask[..., 0]
    return mask[..., 2::-1] if mask.ndim == 3 else mask.astype(np.int64)


def encode_colors(colors: np.ndarray) -> np.ndarray:
    """Colours (..., 3) as one number each, from 0 to 2^24 - 1."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def decode_color(code: int) -> tuple[int, int, int]:
    """The colour of a number of `encode_colors`."""
    return code >> 16, code >> 8 & 255, code & 255


@TRANSFORMS.register_module()
class CropObject(BaseTransform):
    """Crops an image to a square around the object that a sample is about.

    The square is black where it extends beyond the image. Samples without `bbox` are unchanged.

    Args:
        context (float): The side of the square, in lengths of the longer side of the object's box.
            Defaults to 1.2.

    Raises:
        ValueError: `context` is not positive.
    """

    def __init__(self, context: float = 1.2) -> None:
        if not context > 0:
            raise ValueError(f'context must be positive, got {context!r}')
        self.context = context

    def transform(self, results: dict) -> dict:
        """Crop `img` (H, W, ...) around `bbox`, which is (x1, y1, x2, y2) in pixels."""
        if 'bbox' in results:
            x1, y1, x2, y2 = results['bbox']
            side = max(1, round(self.context * max(x2 - x1, y2 - y1)))
            left, top = round((x1 + x2 - side) / 2), round((y1 + y2 - side) / 2)
            # mmcv counts the last pixel as part of a box
            square = np.array([left, top, left + side - 1, top + side - 1])
            results['img'] = mmcv.imcrop(results['img'], square, pad_fill=0)
            results['img_shape'] = results['img'].shape[:2]
        return results
