"""Receptive fields are tested with masses and radii that are known."""

import pytest
import torch
from torch import nn

from saga_mm.analysis.field import gradient_mass, radius
from saga_mm.layers import Conv2d, DepthwiseConv2d


def test_radius_of_known_masses():
    point = torch.zeros(9, 9)
    point[4, 4] = 1
    assert radius(point, 0.9) == 0
    # 1/4 at the centre, 3/4 five tokens away
    point[4, 4], point[0, 1] = 1, 3
    assert radius(point, 0.25) == 0
    assert radius(point, 0.26) == 5
    assert radius(point, 0.9) == 5
    # Measured from the other place, the nearer token has more of the mass.
    assert radius(point, 0.75, (0, 1)) == 0
    # All tokens are equal. Half of the area of a disc has a radius of sqrt(1/2).
    side = torch.arange(101) - 50.0
    disc = (torch.hypot(side[:, None], side) <= 50).float()
    assert radius(disc, 0.5) == pytest.approx(50 * 0.5**0.5, abs=0.5)


def test_mass_is_what_the_centre_sees():
    stack = nn.Sequential(DepthwiseConv2d(4, 3), DepthwiseConv2d(4, 3))
    mass = gradient_mass(stack, torch.randn(2, 11, 12, 4))
    assert mass.sum().item() == pytest.approx(1)
    seen = mass > 0
    expected = torch.zeros_like(seen)
    # Five by five tokens around (11 // 2, 12 // 2).
    expected[3:8, 4:9] = True
    assert torch.equal(seen, expected)


def test_mass_of_a_strided_module_lies_on_its_input():
    mass = gradient_mass(Conv2d(3, 2, 3, stride=4, padding=1), torch.randn(1, 16, 24, 3))
    # token (2, 3) of 4 x 6
    assert mass[7:10, 11:14].sum().item() == pytest.approx(1)
