"""The kernels agree with the convolution of PyTorch in float64.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import BOUNDS, pairwise
from saga_kernels import depthwise_conv2d


def inputs(channels=8, side=3, *, height=4, width=6, dtype=torch.float32, device='cpu'):
    """x, which is a part of a packed projection, weight and bias."""
    wide = torch.randn(1, height, width, 3 * channels).to(device, dtype)
    weight, bias = torch.randn(channels, 1, side, side), torch.randn(channels)
    return wide[..., channels : 2 * channels], weight.to(device), bias.to(device)


def results(x, weight, bias, grad_out, *, add, mask=None, impl='triton'):
    """Output and gradients; `add` is a tensor, None, or 'x'."""
    leaves = [y.detach().requires_grad_() for y in (x, weight, bias)]
    residual = isinstance(add, str)
    if not residual and add is not None:
        leaves.append(add.detach().requires_grad_())
    out = depthwise_conv2d(
        *leaves[:3],
        add=leaves[0] if residual else leaves[3] if len(leaves) > 3 else None,
        mask=mask,
        impl=impl,
    )
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def truth(x, weight, bias, grad_out, *, add, mask=None):
    exact = (y.double() for y in (x, weight, bias, grad_out))
    add = add.double() if isinstance(add, torch.Tensor) else add
    return results(*exact, add=add, mask=mask, impl='reference')


def assert_near(values, exact, dtype):
    for value, expected in zip(values, exact, strict=True):
        error, size = (value.double() - expected).norm().item(), expected.norm().item()
        assert error <= BOUNDS[dtype] * size + 1e-6


CASES = pairwise(
    size=((1, 1), (3, 18)),
    channels=(8, 33),
    side=(1, 3, 5),
    dtype=tuple(BOUNDS),
    add=('none', 'map', 'wider map', 'x'),
    masked=(False, True),
)


@pytest.mark.parametrize(('size', 'channels', 'side', 'dtype', 'add', 'masked'), CASES)
def test_equals_pytorch_in_float64(size, channels, side, dtype, add, masked, triton_device):
    height, width = size
    x, weight, bias = inputs(
        channels, side, height=height, width=width, dtype=dtype, device=triton_device
    )
    other = dict(none=None, x='x')
    other |= {'map': torch.randn_like(x), 'wider map': torch.randn_like(x, dtype=torch.float32)}
    mask = torch.rand(1, *size, 1, device=triton_device) > 0.3 if masked else None
    grad_out = torch.randn_like(x, dtype=torch.float32 if add == 'wider map' else dtype)
    values = results(x, weight, bias, grad_out, add=other[add], mask=mask)
    exact = truth(x, weight, bias, grad_out, add=other[add], mask=mask)
    assert values[0].dtype == grad_out.dtype
    assert_near(values, exact, dtype)


def test_rows_of_several_programs_and_images(triton_device):
    x, weight, bias = inputs(side=1, height=70, width=3, device=triton_device)
    x = torch.cat([x, x.flip(1)])
    exact = truth(x, weight, bias, x.square(), add=None)
    assert_near(results(x, weight, bias, x.square(), add=None), exact, torch.float32)


def test_masked_pixels_change_nothing_even_when_nan(triton_device):
    x, weight, bias = inputs(device=triton_device)
    mask = torch.rand(1, 4, 6, 1, device=triton_device) > 0.4
    other, grad_out = torch.randn(2, *x.shape, device=triton_device)
    exact = truth(x, weight, bias, grad_out, add=other, mask=mask)
    x = torch.where(mask, x, torch.nan)
    values = results(x, weight, bias, grad_out, add=other, mask=mask)
    assert_near(values, exact, torch.float32)
    assert (values[1][~mask.expand_as(x)] == 0).all()


def test_nan_stays_visible(triton_device):
    x, weight, bias = inputs(device=triton_device)
    x[0, 1, 3, 3] = torch.nan
    seen = depthwise_conv2d(x, weight, bias, impl='triton').isnan()
    assert torch.equal(seen, depthwise_conv2d(x, weight, bias, impl='reference').isnan())
    assert seen.sum() == 9


def test_two_runs_are_bitwise_equal(triton_device):
    x, weight, bias = inputs(side=1, height=70, width=3, device=triton_device)
    runs = [results(x, weight, bias, x, add='x') for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize('shape', [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_empty_input_gives_empty_output_and_zero_gradient(shape, triton_device):
    x, weight, bias = inputs(device=triton_device)
    x = x.new_zeros(*shape, 8)
    out, *grads = results(x, weight, bias, x, add='x')
    assert out.shape == x.shape
    zeros = map(torch.zeros_like, (x, weight, bias))
    assert all(map(torch.equal, grads, zeros))


def test_expanded_gradient(triton_device):
    x, weight, bias = inputs(device=triton_device)
    grad_out = torch.ones((), device=triton_device).expand(x.shape)
    exact = truth(x, weight, bias, grad_out, add='x')
    assert_near(results(x, weight, bias, grad_out, add='x'), exact, torch.float32)


def test_flops_are_counted(triton_device):
    x, weight, bias = inputs(device=triton_device)
    with FlopCounterMode(display=False) as counter:
        results(x, weight, bias, x, add='x')
    assert counter.get_total_flops() == 3 * 2 * 9 * x.numel()


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda x, weight: (x.double(), weight), 'not torch.float64'),
        (lambda x, weight: (x, weight.double()), 'not torch.float64'),
        (lambda x, weight: (x.transpose(2, 3), weight[:1].expand(6, 1, 3, 3)), 'not contiguous'),
        (lambda x, weight: (x, weight.new_ones(8, 1, 7, 7)), 'up to 5 pixels a side, not 7'),
    ],
)
def test_what_triton_does_not_take(change, reason, triton_device):
    x, weight = change(*inputs(device=triton_device)[:2])
    with pytest.raises(RuntimeError, match=reason):
        depthwise_conv2d(x, weight, impl='triton')
    if x.dtype == weight.dtype:
        assert depthwise_conv2d(x, weight).shape == x.shape


def test_derivatives_that_the_kernels_lack(triton_device):
    x, weight, bias = inputs(device=triton_device)
    with pytest.raises(RuntimeError, match='the derivatives of forward mode'):
        torch.func.jvp(lambda x: depthwise_conv2d(x, weight, bias, impl='triton'), (x,), (x,))
    torch.func.jvp(lambda x: depthwise_conv2d(x, weight, bias), (x,), (x,))
