"""Transforms of saga_mm that no data set of the tests uses."""

import numpy as np
import pytest

from saga_mm.transforms import CropObject

IMAGE = np.arange(1, 6 * 8 + 1, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize(
    ('bbox', 'context', 'expected'),
    [
        ((2, 1, 4, 3), 1.0, IMAGE[1:3, 2:4]),
        # a square around the middle of a box that is no square
        ((2, 1, 6, 3), 1.0, IMAGE[0:4, 2:6]),
        ((3, 2, 5, 4), 2.0, IMAGE[1:5, 2:6]),
        # black beyond the image
        ((0, 0, 2, 2), 2.0, np.pad(IMAGE[:3, :3], ((1, 0), (1, 0)))),
        ((0, 0, 8, 6), 1.0, np.pad(IMAGE, ((1, 1), (0, 0)))),
        # not even a pixel
        ((3, 3, 3, 3), 1.0, IMAGE[2:3, 2:3]),
        (None, 1.0, IMAGE),
    ],
)
@pytest.mark.parametrize('colors', [False, True])
def test_object_is_cropped(bbox, context, expected, colors):
    def layered(image):
        return np.stack([image] * 3, axis=-1) if colors else image

    results = dict(img=layered(IMAGE)) | (dict(bbox=bbox) if bbox else {})
    cropped = CropObject(context)(results)
    np.testing.assert_array_equal(cropped['img'], layered(expected))
    assert bbox is None or cropped['img_shape'] == expected.shape


def test_context_must_be_positive():
    with pytest.raises(ValueError, match='context must be positive, got 0'):
        CropObject(context=0)
