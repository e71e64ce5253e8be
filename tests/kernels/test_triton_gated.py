"""The Triton kernels agree with the reference in float64, which has its own tests.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import math
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import gated_linear_attention, linear_attention
from saga_kernels.gated.reference import attend


def packed_of(tokens, dim, *, parts=5, dtype=torch.float32, device='cpu', batch=2, heads=2):
    return torch.randn(batch, tokens, parts, heads, dim).to(device, dtype)


def op_of(packed):
    return gated_linear_attention if packed.shape[2] == 5 else linear_attention


def run(packed, grad_out, **options):
    """Output and packed gradient of the Triton op."""
    packed = packed.detach().requires_grad_()
    out = op_of(packed)(packed, impl='triton', **options)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    return out.detach(), grad


def truth(packed, grad_out, feature_map='elu', eps=1e-6, mask=None):
    packed = packed.detach().double().requires_grad_()
    out = attend(packed, feature_map, eps, mask)
    (grad,) = torch.autograd.grad(out, packed, grad_out.double())
    return out.detach(), grad


CASES = pairwise(
    dim=(8, 17, 24, 32, 48, 64, 80, 128),
    tokens=(1, 49, 63, 1000),
    dtype=tuple(BOUNDS),
    parts=(3, 5),
    feature_map=('elu', 'relu'),
    masked=(False, True),
    strided=(False, True),
)


@pytest.mark.parametrize(
    ('dim', 'tokens', 'dtype', 'parts', 'feature_map', 'masked', 'strided'), CASES
)
def test_equals_reference_in_float64(
    dim, tokens, dtype, parts, feature_map, masked, strided, triton_device
):
    batch, heads = (2, 3) if tokens < 100 else (1, 2)
    shape = (batch, tokens, parts, heads, dim)
    packed = torch.randn(shape).to(triton_device, dtype)
    grad_out = torch.randn(batch, tokens, heads, dim).to(triton_device, dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens).to(triton_device) > 0.3
        mask[:, 0] = True
    if strided:
        # A slice of a wider projection, every other token, heads before tokens in memory.
        wide = torch.randn(batch, heads, 2 * tokens, parts + 1, dim).to(triton_device, dtype)
        packed = wide[:, :, ::2, 1:].permute(0, 2, 3, 1, 4)
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        if masked:
            mask = mask.t().contiguous().t()
    # A query that sees no key has a gradient of 1 / eps, too large for fp16 with the default.
    options = dict(feature_map=feature_map, eps=1e-6 if feature_map == 'elu' else 1e-3, mask=mask)
    out, grad = run(packed, grad_out, **options)
    exact_out, exact_grad = truth(packed, grad_out, **options)
    assert (out.dtype, grad.dtype) == (dtype, dtype)
    assert (out.shape, grad.shape) == (exact_out.shape, shape)
    assert rms_ratio(out, exact_out) <= BOUNDS[dtype]
    assert rms_ratio(grad, exact_grad) <= BOUNDS[dtype]
    if masked:
        assert (out[~mask] == 0).all()
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gate', [-8.0, 8.0])
def test_half_precision_neither_overflows_nor_fades(dtype, gate, triton_device):
    # Unscaled S would be near 1e6; with closed gates and a small loss scale, dS is near 1e-8.
    packed = packed_of(1200, 16, dtype=dtype, device=triton_device, batch=1)
    packed[:, :, 1] = packed[:, :, 1].abs() * 30
    packed[:, :, 2] *= 30
    packed[:, :, 3:] += gate
    grad_out = torch.randn(1, 1200, 2, 16).to(triton_device, dtype) * 2.0**-8
    for value, exact in zip(run(packed, grad_out), truth(packed, grad_out), strict=True):
        # fp16 can't hold all of these gradients: a tiny one has the absolute error of its dtype.
        floor = 2.0**-25 * exact.numel() ** 0.5 if dtype == torch.float16 else 0
        error = (value.double() - exact).norm().item()
        assert error <= BOUNDS[dtype] * exact.norm().item() + floor


@pytest.mark.parametrize('gate', [-14.0, -40.0])
def test_closed_gates_do_not_fade_in_fp16(gate, triton_device):
    # The smallest number of fp16 is e^-16.6, with a single digit.
    packed = packed_of(200, 16, dtype=torch.float16, device=triton_device, batch=1)
    packed[:, :, 3] += gate
    grad_out = torch.randn(1, 200, 2, 16).to(triton_device, torch.float16)
    eps = 1e-6 * math.exp(gate)
    values = run(packed, grad_out, eps=eps)
    for value, exact in zip(values, truth(packed, grad_out, eps=eps), strict=True):
        assert rms_ratio(value, exact) <= BOUNDS[torch.float16]


@pytest.mark.parametrize('part', range(5))
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_nan_stays_visible(part, feature_map, triton_device):
    packed = packed_of(70, 17, device=triton_device, batch=1)
    packed[0, 3, part, 1, 2] = float('nan')
    options = dict(feature_map=feature_map, impl='triton')
    seen = gated_linear_attention(packed, **options).isnan()
    expected = attend(packed, feature_map, 1e-6, None).isnan()
    assert expected.any()
    assert torch.equal(seen, expected)


def test_masked_tokens_change_nothing_even_when_nan(triton_device):
    packed = packed_of(90, 24, device=triton_device)
    mask = (torch.arange(90, device=triton_device) < 50).expand(2, 90)
    grad_out = torch.randn(2, 90, 2, 24, device=triton_device)
    alone = run(packed[:, :50], grad_out[:, :50])
    packed[:, 50:] = float('nan')
    grad_out[:, 50:] = float('nan')
    for value, expected in zip(run(packed, grad_out, mask=mask), alone, strict=True):
        torch.testing.assert_close(value[:, :50], expected)
        assert (value[:, 50:] == 0).all()


def test_masked_tokens_get_zeros_even_when_others_are_nan(triton_device):
    packed = packed_of(40, 8, device=triton_device)
    packed[:, 3] = float('nan')
    mask = (torch.arange(40, device=triton_device) < 30).expand(2, 40)
    for value in run(packed, torch.ones(2, 40, 2, 8, device=triton_device), mask=mask):
        assert value[:, :30].isnan().any()
        assert (value[:, 30:] == 0).all()


def test_all_tokens_masked_gives_zeros(triton_device):
    packed = packed_of(20, 8, device=triton_device)
    mask = torch.zeros(2, 20, dtype=torch.bool, device=triton_device)
    for value in run(packed, torch.ones(2, 20, 2, 8, device=triton_device), mask=mask):
        assert (value == 0).all()


@pytest.mark.parametrize('shape', [(0, 10, 5, 2, 8), (2, 0, 5, 2, 8)])
def test_empty_input_gives_empty_output_and_gradient(shape, triton_device):
    packed = torch.randn(shape, device=triton_device, requires_grad=True)
    out = gated_linear_attention(packed, impl='triton')
    assert out.shape == (shape[0], shape[1], 2, 8)
    out.sum().backward()
    assert packed.grad.shape == shape


def test_expanded_gradient(triton_device):
    packed = packed_of(30, 16, device=triton_device).requires_grad_()
    gated_linear_attention(packed, impl='triton').sum().backward()
    _, exact = truth(packed, torch.ones(2, 30, 2, 16, device=triton_device))
    assert rms_ratio(packed.grad, exact) <= 1e-6


def test_two_runs_are_bitwise_equal(triton_device):
    packed = packed_of(1100, 16, device=triton_device)
    grad_out = torch.randn(2, 1100, 2, 16, device=triton_device)
    for first, second in zip(run(packed, grad_out), run(packed, grad_out), strict=True):
        assert torch.equal(first, second)


def test_autocast_keeps_the_dtype_as_the_reference_does(triton_device):
    packed = packed_of(40, 16, device=triton_device)
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        out = gated_linear_attention(packed, impl='triton')
    assert torch.equal(out, gated_linear_attention(packed, impl='triton'))


def test_flops_are_counted(triton_device):
    packed = packed_of(50, 16, device=triton_device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        gated_linear_attention(packed, impl='triton').sum().backward()
    assert counter.get_total_flops() == 12 * 2 * 50 * 2 * 16**2


@pytest.mark.parametrize(
    ('packed', 'reason'),
    [
        (torch.zeros(1, 4, 5, 1, 8, dtype=torch.float64), 'not torch.float64'),
        (torch.zeros(1, 4, 5, 1, 7), 'head dims 8 to 128, not 7'),
        (torch.zeros(1, 4, 5, 1, 129), 'head dims 8 to 128, not 129'),
        (torch.zeros(1, 16, 5, 1, 4).transpose(1, 4), 'last axis of the input is not contiguous'),
    ],
)
def test_what_triton_does_not_take(packed, reason, triton_device):
    packed = packed.to(triton_device)
    with pytest.raises(RuntimeError, match=reason):
        gated_linear_attention(packed, impl='triton')
    assert gated_linear_attention(packed).shape == (1, 4, 1, packed.shape[-1])


LARGE_ADDRESSES = """
import torch
from saga_kernels import gated_linear_attention
strides = {strides}
last = 2 * strides[1] + 4 * strides[2]
memory = torch.empty(last + 8, dtype=torch.float16, device='{device}')
packed = memory.as_strided((1, 3, 5, 1, 8), strides)
values = torch.randn(packed.shape).to(packed)
packed.copy_(values)
results = []
for x in packed, values:
    x = x.detach().requires_grad_()
    out = gated_linear_attention(x, impl='triton')
    out.backward(torch.arange(24).view(out.shape).to(out))
    results.append((out, x.grad))
(out, grad), (expected_out, expected_grad) = results
assert torch.equal(out, expected_out) and torch.equal(grad, expected_grad)
"""


@pytest.mark.parametrize('strides', [(8, 1_100_000_000, 8, 8, 1), (8, 8, 600_000_000, 8, 1)])
def test_addresses_past_2_31(strides, triton_device):
    # In a process of its own, which a wrong offset may crash. Only touched pages take memory.
    script = LARGE_ADDRESSES.format(strides=strides, device=triton_device)
    subprocess.run([sys.executable, '-c', script], check=True)
