"""The data set's metainfo in a checkpoint consists of names and colours."""

import numpy as np
import pytest

from saga_mm.checkpoint import CheckpointError, read_dataset_meta

COLORS = [[0, 0, 0], [255, 0, 0]]


def read(**meta):
    return read_dataset_meta({'meta': {'dataset_meta': meta}}, 'a.pth')


def test_names_and_colours():
    assert read(CLASSES=('a', 'b '), PALETTE=COLORS, x=1) == dict(
        classes=('a', 'b '), palette=COLORS, x=1
    )
    assert read(classes=['a'], palette=None) == dict(classes=('a',), palette=None)
    assert read(classes='a', palette='random')['classes'] == ('a',)
    assert read(palette=np.array(COLORS))['palette'].tolist() == COLORS
    assert read() == {}
    # Terminals would execute these control characters.
    assert read(classes=['\x1b[2J'])['classes'] == ('\\x1b[2J',)


@pytest.mark.parametrize('checkpoint', [{}, {'meta': None}, {'meta': 3}, {'meta': {}}])
def test_there_may_be_nothing(checkpoint):
    assert read_dataset_meta(checkpoint, 'a.pth') is None


@pytest.mark.parametrize(
    'meta',
    [3, [], {3: 3}, {'classes': 3}, {'classes': [3]}, {'palette': 3}, {'palette': [3]}]
    + [{'palette': [[1, 2]]}, {'palette': [['a', 'b', 'c']]}],
)
def test_anything_else_is_an_error(meta):
    with pytest.raises(CheckpointError, match=r'^a\.pth: .*meta\.dataset_meta must be'):
        read_dataset_meta({'meta': {'dataset_meta': meta}}, 'a.pth')
