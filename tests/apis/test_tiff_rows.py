"""Rows of TIFF images have the values that the test pipelines load."""

import cv2
import numpy as np
import pytest

from saga_mm.apis import ImagePipeline
from saga_mm.apis.tiff_rows import TiffRows

tifffile = pytest.importorskip('tifffile')
RGB, GREY = (70, 90, 3), (70, 90)
FORMATS = {
    'strips': dict(rowsperstrip=16),
    'one strip': dict(rowsperstrip=70),
    'strips, deflate': dict(rowsperstrip=7, compression='zlib'),
    'strips, deflate, predictor': dict(rowsperstrip=7, compression='zlib', predictor=True),
    'tiles': dict(tile=(32, 16)),
    'tiles, deflate': dict(tile=(32, 64), compression='zlib'),
    'big': dict(bigtiff=True, tile=(16, 16)),
    'big endian': dict(byteorder='>', rowsperstrip=16),
}


@pytest.fixture
def write(tmp_path):
    """Writes a random image; returns the file."""

    def call(shape, dtype=np.uint8, **options):
        pixels = np.random.default_rng(0).integers(0, 255, shape).astype(dtype)
        colors = 'rgb' if len(shape) == 3 else 'minisblack'
        tifffile.imwrite(tmp_path / 'image.tif', pixels, **(dict(photometric=colors) | options))
        return tmp_path / 'image.tif'

    return call


@pytest.mark.parametrize('shape', [RGB, GREY], ids=['rgb', 'grey'])
@pytest.mark.parametrize('name', FORMATS)
def test_rows_are_those_of_the_image(write, shape, name):
    path = write(shape, **FORMATS[name])
    expected = cv2.imread(str(path))
    if expected is None:
        # OpenCV refuses coloured tiles that are this small
        assert 'tile' in FORMATS[name]
        expected = cv2.cvtColor(tifffile.imread(path), cv2.COLOR_RGB2BGR)
    expected = expected.transpose(2, 0, 1)
    image = TiffRows(path)
    assert image.shape == expected.shape
    for start, stop in [(0, 70), (0, 1), (15, 33), (31, 32), (60, 80), (3, 20), (70, 90)]:
        assert (image[:, start:stop].numpy() == expected[:, start:stop]).all()
    assert (image[1:, 5:9].numpy() == expected[1:, 5:9]).all()
    image.close()


def test_a_tile_is_read_once(write, monkeypatch):
    image = TiffRows(write(RGB, tile=(16, 16), compression='zlib'))
    decoded, decode = [], image._decode
    monkeypatch.setattr(image, '_decode', lambda block: decoded.append(block) or decode(block))
    for start in range(0, 70, 8):
        image[:, max(0, start - 2) : start + 10]
    # the first one was read when the file was opened
    assert decoded == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ('shape', 'options', 'reason'),
    [
        (RGB, dict(dtype=np.uint16), '16 bits'),
        ((70, 90, 4), dict(extrasamples=['unassalpha']), '4 bands'),
        ((3, 70, 90), dict(planarconfig='separate'), 'one after the other'),
        (GREY, dict(photometric='miniswhite'), '1 bands of'),
        (RGB, dict(extratags=[(274, 'H', 1, 6, True)]), 'its orientation is 6'),
    ],
)
def test_other_formats_are_refused(write, shape, options, reason):
    with pytest.raises(ValueError, match=reason):
        TiffRows(write(shape, **options))


@pytest.mark.parametrize('options', [dict(compression='zlib'), {}], ids=['deflate', 'plain'])
def test_a_damaged_file_is_an_error(write, options):
    path = write(RGB, tile=(16, 16), **options)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start = file.pages.first.dataoffsets[-8]
    path.write_bytes(whole[:start] + (b'' if not options else b'x' * 100 + whole[start + 100 :]))
    with pytest.raises(ValueError, match=r'\w'):
        TiffRows(path)[:]


def test_no_tiff_file(tmp_path):
    path = tmp_path / 'image.tif'
    path.write_bytes(b'no image')
    with pytest.raises(ValueError, match='not a TIFF file'):
        TiffRows(path)


def make_pipeline(*steps):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    init_default_scope('mmseg')
    steps = [dict(type='LoadImageFromFile'), *steps, dict(type='PackSegInputs')]
    return ImagePipeline(Config(dict(test_pipeline=steps)))


def test_the_pipeline_gives_the_same(write):
    path = write((300, 270, 3), tile=(256, 256))
    pipeline = make_pipeline(dict(type='LoadAnnotations'))
    expected, _ = pipeline(path)
    found = pipeline.open_rows(path)
    assert (found['inputs'][:] == expected['inputs']).all()
    assert found['data_samples'].metainfo == expected['data_samples'].metainfo


@pytest.mark.parametrize(
    'step', [dict(type='Resize', scale=(32, 32)), dict(type='mmseg.RandomFlip', prob=1.0)]
)
def test_a_pipeline_that_changes_images_needs_all_of_it(write, step):
    with pytest.raises(ValueError, match=f'the test pipeline has {step["type"].split(".")[-1]}'):
        make_pipeline(step).open_rows(write(RGB))
