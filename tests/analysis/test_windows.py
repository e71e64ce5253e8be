"""Sliding windows are where mmseg has them, and their seams are counted."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate

from saga_mm.analysis.window_comparison import segment_in
from saga_mm.analysis.windows import NEAR, Window, borders, edges, near_lines
from saga_mm.apis import build_model
from saga_mm.apis.whole import without_logits

WINDOWS = [Window(32, 32), Window(32, 21), Window(32, 16), Window(48, 33), Window(7, 1)]
LENGTHS = [5, 32, 33, 64, 65, 100, 129]


@pytest.mark.parametrize('window', WINDOWS, ids=str)
@pytest.mark.parametrize('length', LENGTHS)
def test_windows_cover_the_image(window, length):
    for spans in (window.spans(length), window.moved_spans(length)):
        assert set().union(*spans) == set(range(length))
        assert all(0 < len(span) <= window.size for span in spans)


@pytest.mark.parametrize(
    ('window', 'length', 'distance'),
    [
        # without overlap by a half of the stride, with an overlap of a third by a quarter
        (Window(32, 32), 128, 16),
        (Window(64, 32), 128, 16),
        (Window(96, 64), 352, 16),
        # the last window is moved back by mmseg
        (Window(96, 64), 400, 8),
        (Window(512, 341), 4288, 40),
    ],
)
def test_borders_are_moved_away_from_where_they_were(window, length, distance):
    old, new = borders(window.spans(length)), borders(window.moved_spans(length))
    assert min(abs(a - b) for a in old for b in new) >= distance


def test_borders_of_a_single_window_and_of_two():
    assert borders(Window(32, 21).spans(30)) == []
    assert borders(Window(32, 32).spans(64)) == [32]
    assert borders(Window(32, 21).spans(53)) == [21, 32]


def test_edges_and_pixels_near_borders():
    labels = np.zeros((40, 80), np.uint8)
    labels[:, 50:] = 1
    labels[10, 5] = 1
    # the vertical line at 50 is that of a border, and has 40 of the 41 - 1 edges along a row
    found = edges(labels, ([20], [50]))
    assert found['at'] == (40, 40 + 80)
    assert found['elsewhere'] == (4, 40 * 79 + 39 * 80 - 120)
    near = near_lines((40, 80), ([], [50]))
    assert near.all(axis=0).tolist() == [50 - NEAR <= x < 50 + NEAR for x in range(80)]


@pytest.mark.parametrize('size', [(64, 80), (30, 47)])
@pytest.mark.parametrize('window', [Window(32, 32), Window(32, 21)], ids=str)
def test_windows_give_what_slide_mode_gives(tiny_model, size, window):
    model, data = tiny_model(size)
    rows, columns = (window.spans(side) for side in size)
    found = segment_in(model, data, rows, columns)
    side, stride = (window.size,) * 2, (window.stride,) * 2
    model.test_cfg = ConfigDict(mode='slide', crop_size=side, stride=stride)
    with torch.no_grad():
        (expected,) = model.test_step(pseudo_collate([data]))
    expected = without_logits(expected, 7).pred_sem_seg.data[0].numpy()
    assert len(np.unique(expected)) > 1
    assert (found == expected).all()


@pytest.fixture
def tiny_model():
    """Makes a segmentor with random weights, and a random image of a size."""
    from mmengine.config import Config
    from mmseg.structures import SegDataSample

    def make(size):
        torch.manual_seed(0)
        model = dict(
            type='EncoderDecoder',
            data_preprocessor=dict(type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3),
            backbone=dict(
                type='saga_mm.SAGA',
                arch=dict(embed_dims=(8,), depths=(1,), num_heads=(1,)),
                out_indices=(0,),
            ),
            decode_head=dict(type='FCNHead', in_channels=8, channels=8, num_classes=7),
            test_cfg=dict(mode='whole'),
        )
        image = torch.randint(256, (3, *size), dtype=torch.uint8)
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
        model = build_model(Config(dict(default_scope='mmseg', model=model)))
        torch.nn.init.normal_(model.decode_head.conv_seg.weight)
        return model, dict(inputs=image, data_samples=sample)

    return make
