"""tools/padding_leak.py shows the leak, and that the mask removes it."""

import pytest


@pytest.fixture
def padding_leak(tool):
    return tool('padding_leak')


def test_the_mask_ends_the_leak(padding_leak, capsys):
    models = ['saga_t', 'sola_vision_t, decay']
    padding_leak.main(['--models', *models, '--image', '45', '60', '--batch', '64', '96'])
    rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [name, mask] for name in models for mask in ('False', 'True')
    ]
    for _, mask, *ratios in rows:
        assert len(ratios) == 4
        assert all((float(ratio) < 1e-5) == (mask == 'True') for ratio in ratios)


def test_mistakes_are_one_line(padding_leak):
    with pytest.raises(SystemExit) as exit_:
        padding_leak.main(['--image', '70', '60', '--batch', '64', '96'])
    assert exit_.value.code == 'error: --image must fit into --batch, got [70, 60] and [64, 96]'
