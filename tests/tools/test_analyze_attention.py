"""tools/receptive_field.py: masses and radii that are known, and the growth that it is to show."""

import sys

import cv2
import pytest
import torch
from torch import nn

from saga_mm.layers import DepthwiseConv2d


@pytest.fixture
def field(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'infer', tool('infer'))
    return tool('receptive_field')


def test_radius_of_known_masses(field):
    point = torch.zeros(9, 9)
    point[4, 4] = 1
    assert field.radius(point, 0.9) == 0
    # 1/4 at the centre, 3/4 five tokens away
    point[4, 4], point[0, 1] = 1, 3
    assert field.radius(point, 0.25) == 0
    assert field.radius(point, 0.26) == 5
    assert field.radius(point, 0.9) == 5
    # all tokens alike: of a disc, half of the area has a radius of the square root of a half
    side = torch.arange(101) - 50.0
    disc = (torch.hypot(side[:, None], side) <= 50).float()
    assert field.radius(disc, 0.5) == pytest.approx(50 * 0.5**0.5, abs=0.5)


def test_mass_is_what_the_centre_sees(field):
    stack = nn.Sequential(DepthwiseConv2d(4, 3), DepthwiseConv2d(4, 3))
    mass = field.gradient_mass(stack, torch.randn(2, 11, 12, 4))
    assert mass.sum().item() == pytest.approx(1)
    seen = mass > 0
    expected = torch.zeros_like(seen)
    # five by five tokens about (11 // 2, 12 // 2)
    expected[3:8, 4:9] = True
    assert torch.equal(seen, expected)


def test_decay_grows_with_depth_and_softmax_sees_all(field, tmp_path, capsys):
    options = ['--size', '33', '--dim', '8', '--heads', '2', '--inputs', '1', '--depth', '4']
    lengths = ['--decay-lengths', '1', '1']
    kinds = ['--kinds', 'decay', 'softmax', 'plain']
    field.main([*kinds, *options, *lengths, '--device', 'cpu', '--out-dir', str(tmp_path)])
    lines = (tmp_path / 'receptive_field.md').read_text().splitlines()
    assert lines[2] == '| depth | decay | softmax | plain | uniform |'
    radii = [
        [float(cell.split(' / ')[1]) for cell in line.strip('| ').split(' | ')[1:]]
        for line in lines[4:]
    ]
    decay, softmax, plain, uniform = zip(*radii, strict=True)
    assert decay[0] < decay[1] < decay[3] < 0.6 * uniform[0]
    # four times the layers, twice the radius: the square root
    assert 1.4 < decay[3] / decay[0] < 3
    assert min(softmax + plain) > 0.9 * uniform[0]
    assert cv2.imread(str(tmp_path / 'receptive_field.png')) is not None
    assert 'receptive_field.png' in capsys.readouterr().out


def test_mistakes_are_one_line(field):
    with pytest.raises(SystemExit) as exit_:
        field.main(['--depth', '0'])
    assert exit_.value.code == 'error: depth must be at least 1, got 0'
    with pytest.raises(SystemExit) as exit_:
        field.main(['--heads', '3'])
    assert 'dim must be a multiple of num_heads, got 64 and 3' in exit_.value.code
