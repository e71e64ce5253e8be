"""Class maps are written as their rows come, and areas are those on the ground."""

import numpy as np
import pytest
from PIL import Image

from saga_mm.apis.class_maps import legend, pixel_area, write_class_map

tifffile = pytest.importorskip('tifffile')
SCALE, TRANSFORMATION, KEYS = 33550, 34264, 34735
METRE, UTM, FEET = (3076, 0, 1, 9001), (3072, 0, 1, 32633), (3076, 0, 1, 9002)
PALETTE = [(0, 0, 0), (250, 0, 0), (0, 200, 0)]


@pytest.fixture
def write(tmp_path):
    """Writes an image of two pixels with tags of doubles and keys; returns the file."""

    def call(tags, *keys):
        keys = [1, 1, 0, len(keys), *np.ravel(keys).astype(int).tolist()]
        extra = [(code, 12, len(value), tuple(value), True) for code, value in tags.items()]
        extra.append((KEYS, 3, len(keys), tuple(keys), True))
        pixels = np.zeros((1, 2, 3), np.uint8)
        tifffile.imwrite(tmp_path / 'image.tif', pixels, photometric='rgb', extratags=extra)
        return tmp_path / 'image.tif'

    return call


# half a metre wide and two metres high, turned by 90 degrees
TURNED = [0, 2, 0, 450000, -0.5, 0, 0, 5200000, 0, 0, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ('tags', 'keys', 'area'),
    [
        ({SCALE: (0.5, 2, 0)}, [METRE], 1),
        ({SCALE: (0.5, 2, 0)}, [(1024, 0, 1, 1), UTM], 1),
        ({SCALE: (10, 10, 0)}, [(3072, 0, 1, 25832)], 100),
        ({SCALE: (1, 1, 0)}, [FEET, UTM], 0.3048**2),
        ({TRANSFORMATION: TURNED}, [METRE], 1),
        # degrees, an unknown projection, an unknown unit, no scale
        ({SCALE: (0.5, 0.5, 0)}, [(1024, 0, 1, 2), (2048, 0, 1, 4326)], None),
        ({SCALE: (0.5, 0.5, 0)}, [(3072, 0, 1, 2056)], None),
        ({SCALE: (0.5, 0.5, 0)}, [(3076, 0, 1, 9036), UTM], None),
        ({}, [METRE], None),
        ({SCALE: (0.5, 0.5, 0)}, [], None),
    ],
)
def test_area_of_a_pixel(write, tags, keys, area):
    found = pixel_area(write(tags, *keys))
    assert found == (None if area is None else pytest.approx(area))


def test_files_without_coordinates_have_no_area(tmp_path):
    Image.new('RGB', (4, 4)).save(tmp_path / 'a.png')
    tifffile.imwrite(tmp_path / 'a.tif', np.zeros((4, 4), np.uint8))
    assert pixel_area(tmp_path / 'a.png') is None
    assert pixel_area(tmp_path / 'a.tif') is None


def test_legend_with_areas():
    lines = legend(np.array([10, 0, 30]), ['sky', 'sea', 'land'], PALETTE, 1e5).splitlines()
    assert lines[0].endswith('30 pixels   75.0 %  3.000 km2')
    assert lines[1].endswith('10 pixels   25.0 %  1.000 km2')
    assert len(lines) == 2
    assert legend(np.array([3, 0, 1]), ['a', 'b', 'c'], PALETTE).splitlines()[0].endswith('75.0 %')


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('name', ['map.png', 'map.tif'])
@pytest.mark.parametrize('shape', [(1, 1), (512, 512), (1100, 700)])
def test_rows_of_any_number_become_a_file(write, tmp_path, name, shape, dtype):
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    parts = (labels[start : start + 77] for start in range(0, shape[0], 77))
    write_class_map(tmp_path / name, parts, shape, dtype, PALETTE, write({}))
    assert np.array_equal(np.asarray(Image.open(tmp_path / name)), labels)


def test_an_error_on_the_way_leaves_the_old_file(write, tmp_path):
    def parts():
        yield np.zeros((600, 700), np.uint8)
        raise ValueError('no more memory')

    image, path = write({}), tmp_path / 'map.tif'
    path.write_bytes(b'old')
    with pytest.raises(ValueError, match='no more memory'):
        write_class_map(path, parts(), (1100, 700), np.uint8, PALETTE, image)
    assert path.read_bytes() == b'old'
    assert {file.name for file in tmp_path.iterdir()} == {'image.tif', 'map.tif'}
