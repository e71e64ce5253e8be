"""tools/get_flops.py against counts by hand."""

import pytest
from mmengine.config import Config

CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['saga_mm'], allow_failed_imports=False)
arch = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='saga_mm.RAVLT', arch=arch, linear_stages={linear_stages}),
    decode_head=dict(type='FCNHead', in_channels=8, in_index=0, channels=4, num_classes=2),
)
"""


@pytest.fixture
def count(tool):
    counter = tool('get_flops')

    def run(size, linear_stages=2):
        cfg = Config.fromstring(CONFIG.format(linear_stages=linear_stages), '.py')
        return counter.count(cfg, size)

    return run


def test_attention_is_counted(count):
    softmax, linear = (count((64, 64), n)['RAVLT'][1] * 1e9 for n in (3, 4))
    # in the last stage; softmax: q k, (q k) v; linear: logits, denominator, k v, q (k v)
    tokens, dim = 2 * 2, 32
    difference = 2 * tokens**2 * dim - (2 * tokens * dim + 2 * tokens * dim**2)
    assert softmax - linear == pytest.approx(difference)


def test_parts_and_total(count):
    counts = count((64, 64))
    assert list(counts) == ['RAVLT', 'FCNHead', 'total']
    for column in range(2):
        parts = counts['RAVLT'][column] + counts['FCNHead'][column]
        assert parts == pytest.approx(counts['total'][column])
    # three 3x3 convolutions, the last of the input and the others' output, and the classifier
    by_hand = 16 * 16 * (9 * 8 * 4 + 9 * 4 * 4 + 9 * (8 + 4) * 4 + 4 * 2)
    assert counts['FCNHead'][1] * 1e9 == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ('config', 'parts'),
    [
        ('mask_rcnn_ravlt_t', ['RAVLT', 'FPN', 'RPNHead', 'Shared2FCBBoxHead', 'FCNMaskHead']),
        ('retinanet_ravlt_t', ['RAVLT', 'FPN', 'RetinaHead']),
    ],
)
def test_detectors(config, parts, tool, capsys):
    tool('get_flops').main([f'configs/detection/{config}.py', '--size', '64', '96'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'one image of 64 x 96'
    assert [line.split(' | ')[0][2:] for line in lines[3:]] == [*parts, 'total']
    assert all(float(line.split(' | ')[2].strip(' |')) > 0 for line in lines[3:])
