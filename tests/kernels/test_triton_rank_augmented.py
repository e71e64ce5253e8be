"""The Triton kernels agree with the reference in float64, which has its own tests.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import rank_augmented_linear_attention
from saga_kernels.rank_augmented.reference import attend


def packed_of(tokens, dim, *, dtype=torch.float32, device='cpu', batch=2, heads=2):
    return torch.randn(batch, tokens, 3, heads, dim).to(device, dtype)


def frequencies_of(qkv):
    """Frequencies with a stride, which the kernels must accept as well."""
    frequencies = 10000 ** -torch.linspace(0, 1, qkv.shape[-1] // 4, device=qkv.device)
    return torch.stack((frequencies, torch.full_like(frequencies, torch.nan)), -1)[:, 0]


def run(qkv, size, grad_out, **options):
    """Output and packed gradient of the Triton op."""
    qkv = qkv.detach().requires_grad_()
    frequencies = frequencies_of(qkv)
    out = rank_augmented_linear_attention(qkv, size, frequencies, impl='triton', **options)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    return out.detach(), grad


def truth(qkv, size, grad_out, eps=1e-6, mask=None):
    frequencies = frequencies_of(qkv)
    qkv = qkv.detach().double().requires_grad_()
    out = attend(qkv, size, frequencies, eps, mask)
    (grad,) = torch.autograd.grad(out, qkv, grad_out.double())
    return out.detach(), grad


CASES = pairwise(
    dim=(8, 24, 32, 48, 64, 80, 128),
    size=((1, 1), (7, 7), (9, 7), (25, 40)),
    dtype=tuple(BOUNDS),
    masked=(False, True),
    strided=(False, True),
)


@pytest.mark.parametrize(('dim', 'size', 'dtype', 'masked', 'strided'), CASES)
def test_equals_reference_in_float64(dim, size, dtype, masked, strided, triton_device):
    tokens = size[0] * size[1]
    batch, heads = (2, 3) if tokens < 100 else (1, 1)
    qkv = packed_of(tokens, dim, dtype=dtype, device=triton_device, batch=batch, heads=heads)
    grad_out = torch.randn(batch, tokens, heads, dim).to(triton_device, dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens).to(triton_device) > 0.3
        mask[:, 0] = True
    if strided:
        # A slice of a wider projection, every other token, heads before tokens in memory.
        wide = torch.randn(batch, heads, 2 * tokens, 4, dim).to(triton_device, dtype)
        qkv = wide[:, :, ::2, 1:].permute(0, 2, 3, 1, 4)
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        if masked:
            mask = mask.t().contiguous().t()
    out, grad = run(qkv, size, grad_out, mask=mask)
    exact_out, exact_grad = truth(qkv, size, grad_out, mask=mask)
    assert (out.dtype, grad.dtype) == (dtype, dtype)
    assert (out.shape, grad.shape) == (exact_out.shape, qkv.shape)
    assert rms_ratio(out, exact_out) <= BOUNDS[dtype]
    assert rms_ratio(grad, exact_grad) <= BOUNDS[dtype]
    if masked:
        assert (out[~mask] == 0).all()
        assert (grad[~mask] == 0).all()


def test_gradient_where_eps_matters(triton_device):
    # The softmax's normaliser cancels up to eps; here eps is as large as the rest.
    qkv = packed_of(49, 16, device=triton_device)
    grad_out = torch.randn(2, 49, 2, 16, device=triton_device)
    values = run(qkv, (7, 7), grad_out, eps=30.0)
    for value, exact in zip(values, truth(qkv, (7, 7), grad_out, eps=30.0), strict=True):
        assert rms_ratio(value, exact) <= BOUNDS[torch.float32]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('key', [30.0, -12.0])
def test_half_precision_neither_overflows_nor_fades(dtype, key, triton_device):
    # Weights from 1 to e^-500 and keys near 100; or keys near e^-12 and a small loss scale.
    qkv = packed_of(600, 16, dtype=dtype, device=triton_device, batch=1, heads=1)
    qkv[:, :, 1] = qkv[:, :, 1].abs() * key if key > 0 else qkv[:, :, 1] + key
    qkv[:, :, 2] *= 300
    grad_out = torch.randn(1, 600, 1, 16).to(triton_device, dtype) * 2.0**-8
    values = run(qkv, (30, 20), grad_out)
    for value, exact in zip(values, truth(qkv, (30, 20), grad_out), strict=True):
        # fp16 can't hold all of these gradients: a tiny one has the absolute error of its dtype.
        floor = 2.0**-25 * exact.numel() ** 0.5 if dtype == torch.float16 else 0
        error = (value.double() - exact).norm().item()
        assert error <= BOUNDS[dtype] * exact.norm().item() + floor


def test_light_tokens_do_not_fade_beside_a_heavy_one(triton_device):
    # Half of the queries see no channel of the one token that has nearly all of the weight: the
    # others are e^-14 of it, which fp16 would hold with one bit.
    qkv = torch.full((1, 60, 3, 1, 8), -12.0)
    qkv[:, :30, 0, :, :1] = 1
    qkv[:, 30:, 0, :, 2:] = 0.5
    qkv[:, :, 1, :, 2:] = 0
    qkv[:, 7, 1] = -12
    qkv[:, 7, 1, :, :1] = 43
    qkv[:, :, 2] = torch.randn(1, 60, 1, 8) + 1
    qkv = qkv.to(triton_device, torch.float16)
    grad_out = torch.randn(1, 60, 1, 8).to(qkv)
    (out, grad), (exact, exact_grad) = (f(qkv, (6, 10), grad_out) for f in (run, truth))
    assert rms_ratio(out[:, 30:], exact[:, 30:]) <= BOUNDS[torch.float16]
    assert rms_ratio(grad, exact_grad) <= BOUNDS[torch.float16]


@pytest.mark.parametrize('size', [(1, 900), (900, 1)])
def test_angles_of_a_long_image(size, triton_device):
    qkv = packed_of(900, 16, device=triton_device, batch=1, heads=1)
    grad_out = torch.randn(1, 900, 1, 16, device=triton_device)
    for value, exact in zip(run(qkv, size, grad_out), truth(qkv, size, grad_out), strict=True):
        assert rms_ratio(value, exact) <= BOUNDS[torch.float32]


@pytest.mark.parametrize('size', [(1, 5000), (30, 7)])
def test_table_of_the_rotation_equals_float64(size, triton_device):
    height, width = size
    qkv = packed_of(height * width, 8, device=triton_device, batch=1, heads=1)
    frequencies = torch.tensor([1.0, 0.37], device=triton_device)
    table = torch.ops.saga_kernels.rank_augmented_forward(qkv, frequencies, None, width, 1e-6)[1]
    positions = torch.cat([torch.arange(n, dtype=torch.float64) for n in (width, height)])
    angles = positions[:, None] * frequencies.cpu().double()
    exact = torch.stack((angles.cos(), angles.sin()), 1)
    assert table.shape == exact.shape
    assert (table.cpu() - exact).abs().max() <= 2.0**-22


@pytest.mark.parametrize('part', range(3))
def test_nan_stays_visible(part, triton_device):
    qkv = packed_of(70, 20, device=triton_device, batch=1)
    qkv[0, 3, part, 1, 2] = float('nan')
    frequencies = frequencies_of(qkv)
    seen = rank_augmented_linear_attention(qkv, (7, 10), frequencies, impl='triton').isnan()
    expected = attend(qkv, (7, 10), frequencies, 1e-6, None).isnan()
    assert expected.any()
    assert torch.equal(seen, expected)


def test_masked_tokens_change_nothing_even_when_nan(triton_device):
    qkv = packed_of(90, 24, device=triton_device)
    mask = (torch.arange(90, device=triton_device) < 50).expand(2, 90)
    grad_out = torch.randn(2, 90, 2, 24, device=triton_device)
    alone = run(qkv[:, :50], (5, 10), grad_out[:, :50])
    qkv[:, 50:] = float('nan')
    grad_out[:, 50:] = float('nan')
    values = run(qkv, (9, 10), grad_out, mask=mask)
    for value, expected in zip(values, alone, strict=True):
        torch.testing.assert_close(value[:, :50], expected)
        assert (value[:, 50:] == 0).all()


@pytest.mark.parametrize('tokens', [20, 600])
def test_all_tokens_masked_gives_zeros(tokens, triton_device):
    qkv = packed_of(tokens, 8, device=triton_device, batch=1, heads=1)
    mask = torch.zeros(1, tokens, dtype=torch.bool, device=triton_device)
    grad_out = torch.ones(1, tokens, 1, 8, device=triton_device)
    for value in run(qkv, (tokens // 20, 20), grad_out, mask=mask):
        assert (value == 0).all()


def test_a_masked_part_beside_a_live_one(triton_device):
    # Whole programs of the first pass see no token.
    qkv = packed_of(600, 8, device=triton_device, batch=1, heads=1)
    mask = (torch.arange(600, device=triton_device) >= 400)[None]
    grad_out = torch.randn(1, 600, 1, 8, device=triton_device)
    values = run(qkv, (6, 100), grad_out, mask=mask)
    for value, exact in zip(values, truth(qkv, (6, 100), grad_out, mask=mask), strict=True):
        assert rms_ratio(value, exact) <= BOUNDS[torch.float32]


@pytest.mark.parametrize(('batch', 'size'), [(0, (2, 5)), (2, (0, 5))])
def test_empty_input_gives_empty_output_and_gradient(batch, size, triton_device):
    tokens = size[0] * size[1]
    qkv = packed_of(tokens, 8, device=triton_device, batch=batch)
    out, grad = run(qkv, size, qkv[:, :, 0])
    assert (out.shape, grad.shape) == ((batch, tokens, 2, 8), qkv.shape)


def test_expanded_gradient(triton_device):
    qkv = packed_of(30, 16, device=triton_device).requires_grad_()
    out = rank_augmented_linear_attention(qkv, (5, 6), frequencies_of(qkv), impl='triton')
    out.sum().backward()
    _, exact = truth(qkv, (5, 6), torch.ones_like(out))
    assert rms_ratio(qkv.grad, exact) <= 1e-6


def test_two_runs_are_bitwise_equal(triton_device):
    qkv = packed_of(600, 16, device=triton_device, batch=1)
    grad_out = torch.randn(1, 600, 2, 16, device=triton_device)
    runs = (run(qkv, (6, 100), grad_out) for _ in range(2))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_autocast_keeps_the_dtype_as_the_reference_does(triton_device):
    qkv = packed_of(40, 16, device=triton_device)
    frequencies = frequencies_of(qkv)
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        out = rank_augmented_linear_attention(qkv, (5, 8), frequencies, impl='triton')
    expected = rank_augmented_linear_attention(qkv, (5, 8), frequencies, impl='triton')
    assert torch.equal(out, expected)


def test_flops_are_counted(triton_device):
    qkv = packed_of(50, 16, device=triton_device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = rank_augmented_linear_attention(qkv, (5, 10), frequencies_of(qkv), impl='triton')
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 50 * 2 * 16**2


@pytest.mark.parametrize(
    ('qkv', 'reason'),
    [
        (torch.zeros(1, 4, 3, 1, 8, dtype=torch.float64), 'not torch.float64'),
        (torch.zeros(1, 4, 3, 1, 4), 'head dims 8 to 128, not 4'),
        (torch.zeros(1, 4, 3, 1, 132), 'head dims 8 to 128, not 132'),
        (torch.zeros(1, 16, 3, 1, 4).transpose(1, 4), 'last axis of the input is not contiguous'),
    ],
)
def test_what_triton_does_not_take(qkv, reason, triton_device):
    qkv = qkv.to(triton_device)
    frequencies = frequencies_of(qkv)
    with pytest.raises(RuntimeError, match=reason):
        rank_augmented_linear_attention(qkv, (2, 2), frequencies, impl='triton')
    out = rank_augmented_linear_attention(qkv, (2, 2), frequencies)
    assert out.shape == (1, 4, 1, qkv.shape[-1])


LARGE_ADDRESSES = """
import torch
from saga_kernels import rank_augmented_linear_attention
strides = {strides}
last = 2 * strides[1] + 2 * strides[2]
memory = torch.empty(last + 8, dtype=torch.float16, device='{device}')
qkv = memory.as_strided((1, 3, 3, 1, 8), strides)
values = torch.randn(qkv.shape).to(qkv)
qkv.copy_(values)
frequencies = torch.ones(2, device='{device}')
results = []
for x in qkv, values:
    x = x.detach().requires_grad_()
    out = rank_augmented_linear_attention(x, (1, 3), frequencies, impl='triton')
    out.backward(torch.arange(24).view(out.shape).to(out))
    results.append((out, x.grad))
(out, grad), (expected_out, expected_grad) = results
assert torch.equal(out, expected_out) and torch.equal(grad, expected_grad)
"""


@pytest.mark.parametrize('strides', [(8, 1_100_000_000, 8, 8, 1), (8, 8, 1_100_000_000, 8, 1)])
def test_addresses_past_2_31(strides, triton_device):
    # In a process of its own, which a wrong offset may crash. Only touched pages take memory.
    script = LARGE_ADDRESSES.format(strides=strides, device=triton_device)
    subprocess.run([sys.executable, '-c', script], check=True)
