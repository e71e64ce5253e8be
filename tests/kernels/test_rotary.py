"""The rotation agrees with products of complex numbers."""

import pytest
import torch

from saga_kernels import apply_rotary_2d


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('between', [(), (3,), (2, 3)])
def test_rotation_is_a_product_of_complex_numbers(dtype, between):
    height, width, dim = 5, 7, 8
    x = torch.randn(2, height * width, *between, dim, dtype=torch.float64).to(dtype)
    frequencies = torch.tensor([1, 1e-4], dtype=torch.float64)
    row, column = torch.arange(height)[:, None, None], torch.arange(width)[:, None]
    angles = torch.cat(torch.broadcast_tensors(row * frequencies, column * frequencies), dim=-1)
    turns = torch.polar(torch.ones_like(angles), angles)
    turns = turns.reshape(height * width, *(1,) * len(between), dim // 2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    truth = torch.view_as_real(pairs * turns).flatten(-2)
    turned = apply_rotary_2d(x, (height, width), frequencies)
    assert turned.dtype == dtype
    torch.testing.assert_close(turned, truth.to(dtype))


def test_angles_of_half_precision_are_float32():
    # bfloat16 can represent neither position 3999 nor its angle.
    x, frequencies = torch.randn(1, 4000, 8).bfloat16(), torch.tensor([1.0, 0.1])
    turned, truth = (apply_rotary_2d(x, (1, 4000), frequencies) for x in (x, x.double()))
    torch.testing.assert_close(turned, truth.bfloat16())
