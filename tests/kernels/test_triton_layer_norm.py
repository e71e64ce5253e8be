"""The kernels agree with the layer norm of PyTorch in float64.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import pytest
import torch

from harness import BOUNDS, pairwise
from saga_kernels import layer_norm


def inputs(rows=35, channels=24, *, dtype=torch.float32, device='cpu'):
    x = 3 * torch.randn(rows, channels) + 1
    weight, bias = torch.randn(2, channels)
    return x.to(device, dtype), weight.to(device), bias.to(device)


def results(leaves, grad_out, impl='triton', **options):
    leaves = [y.detach().requires_grad_() for y in leaves]
    out = layer_norm(*leaves, 1e-6, impl=impl, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


def assert_near(values, leaves, grad_out, dtype):
    exact = results([y.double() for y in leaves], grad_out.double(), impl='reference')
    for value, expected in zip(values, exact, strict=True):
        error, size = (value.double() - expected).norm().item(), expected.norm().item()
        assert error <= BOUNDS[dtype] * size + 1e-6


CASES = pairwise(
    rows=(1, 35, 300),
    channels=(4, 8, 64, 100, 320, 1024),
    dtype=tuple(BOUNDS),
    out=(None, torch.float32, torch.bfloat16),
)


@pytest.mark.parametrize(('rows', 'channels', 'dtype', 'out'), CASES)
def test_equals_pytorch_in_float64(rows, channels, dtype, out, triton_device):
    leaves = inputs(rows, channels, dtype=dtype, device=triton_device)
    grad_out = torch.randn_like(leaves[0], dtype=out or dtype)
    values = results(leaves, grad_out, dtype=out)
    assert [value.dtype for value in values] == [out or dtype, dtype] + [torch.float32] * 2
    assert_near(values, leaves, grad_out, max(dtype, out or dtype, key=BOUNDS.get))


def test_maps_of_any_shape_and_stride(triton_device):
    x, *parameters = inputs(24, device=triton_device)
    x = x.view(2, 3, 4, 24).transpose(1, 2)
    grad_out = torch.ones((), device=triton_device).expand(x.shape)
    values = results((x, *parameters), grad_out)
    assert values[0].is_contiguous()
    assert_near(values, (x, *parameters), grad_out, torch.float32)


def test_large_means_lose_no_digits(triton_device):
    x, weight, bias = inputs(channels=64, device=triton_device)
    out = layer_norm(x + 1000, weight, bias, impl='triton')
    truth = layer_norm(x.double() + 1000, weight.double(), bias.double())
    assert (out - truth).abs().max() < 1e-3


def test_nan_stays_in_its_row(triton_device):
    x, weight, bias = inputs(device=triton_device)
    x[3, 2] = torch.nan
    seen = layer_norm(x, weight, bias, impl='triton').isnan()
    assert seen[3].all()
    assert seen.sum() == x.shape[1]


def test_two_runs_are_bitwise_equal(triton_device):
    leaves = inputs(700, device=triton_device)
    runs = [results(leaves, leaves[0]) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_empty_input_gives_empty_output_and_zero_gradient(triton_device):
    leaves = inputs(0, device=triton_device)
    out, *grads = results(leaves, leaves[0])
    assert out.shape == leaves[0].shape
    assert all(map(torch.equal, grads, map(torch.zeros_like, leaves)))


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda leaves: [y.double() for y in leaves], 'not torch.float64'),
        (lambda leaves: [y.repeat_interleave(50, -1) for y in leaves], 'up to 1024 channels'),
        (lambda leaves: [leaves[0].repeat_interleave(2, -1)[:, ::2], *leaves[1:]], 'contiguous'),
    ],
)
def test_what_triton_does_not_take(change, reason, triton_device):
    leaves = change(inputs(device=triton_device))
    with pytest.raises(RuntimeError, match=reason):
        layer_norm(*leaves, impl='triton')
    assert layer_norm(*leaves).shape == leaves[0].shape


def test_derivatives_that_the_kernels_lack(triton_device):
    x, weight, bias = inputs(device=triton_device)
    with pytest.raises(RuntimeError, match='the derivatives of forward mode'):
        torch.func.jvp(lambda x: layer_norm(x, weight, bias, impl='triton'), (x,), (x,))
    torch.func.jvp(lambda x: layer_norm(x, weight, bias), (x,), (x,))
