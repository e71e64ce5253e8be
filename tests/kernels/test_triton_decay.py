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
from saga_kernels import decay_linear_attention
from saga_kernels.decay.reference import attend
from saga_kernels.launch import decay_chunk


def qkv_of(tokens, dim, *, dtype=torch.float32, device='cpu', batch=2, heads=2):
    return torch.randn(batch, tokens, 3, heads, dim).to(device, dtype)


def log_decay_of(qkv, gammas=(0.9, 0.99)):
    heads = qkv.shape[3]
    return torch.tensor(gammas, device=qkv.device).log().repeat(heads)[:heads]


def run(qkv, log_decay, size, grad_out, **options):
    """Output and gradients, packed and of log_decay, of the Triton op."""
    qkv, log_decay = qkv.detach().requires_grad_(), log_decay.detach().requires_grad_()
    out = decay_linear_attention(qkv, log_decay, size, impl='triton', **options)
    return out.detach(), *torch.autograd.grad(out, (qkv, log_decay), grad_out)


def truth(qkv, log_decay, size, grad_out, feature_map='elu', eps=1e-6, mask=None):
    qkv, log_decay = (x.detach().double().requires_grad_() for x in (qkv, log_decay))
    out = attend(qkv, log_decay, size, feature_map, eps, mask)
    return out.detach(), *torch.autograd.grad(out, (qkv, log_decay), grad_out.double())


def assert_near(values, exact, dtype, floor=0.0):
    # The gradient of log_decay is one sum per head over terms of both signs.
    for value, expected, factor in zip(values, exact, (1, 1, 5), strict=True):
        error, size = (value.double() - expected).norm().item(), expected.norm().item()
        assert error <= factor * BOUNDS[dtype] * size + floor * expected.numel() ** 0.5


CASES = pairwise(
    dim=(8, 17, 24, 32, 48, 64, 80, 128),
    size=((1, 1), (7, 7), (9, 7), (25, 24)),
    dtype=tuple(BOUNDS),
    gammas=((0.97, 1.0, 0.5), (1e-6, 0.3, 0.999)),
    feature_map=('elu', 'relu'),
    masked=(False, True),
    strided=(False, True),
)


@pytest.mark.parametrize(
    ('dim', 'size', 'dtype', 'gammas', 'feature_map', 'masked', 'strided'), CASES
)
def test_equals_reference_in_float64(
    dim, size, dtype, gammas, feature_map, masked, strided, triton_device
):
    tokens = size[0] * size[1]
    batch, heads = (2, 3) if tokens < 50 else (1, 2)
    qkv = qkv_of(tokens, dim, dtype=dtype, device=triton_device, batch=batch, heads=heads)
    grad_out = torch.randn(batch, tokens, heads, dim).to(triton_device, dtype)
    log_decay = log_decay_of(qkv, gammas)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens).to(triton_device) > 0.3
        mask[:, 0] = True
    if strided:
        # A slice of a wider projection, every other token, heads before tokens in memory.
        wide = torch.randn(batch, heads, 2 * tokens, 4, dim).to(triton_device, dtype)
        qkv = wide[:, :, ::2, 1:].permute(0, 2, 3, 1, 4)
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        log_decay = log_decay.repeat_interleave(2)[::2]
        if masked:
            mask = mask.t().contiguous().t()
    # A query that sees no key has a gradient of 1 / eps, too large for fp16 with the default.
    options = dict(feature_map=feature_map, eps=1e-6 if feature_map == 'elu' else 1e-3, mask=mask)
    values = run(qkv, log_decay, size, grad_out, **options)
    exact = truth(qkv, log_decay, size, grad_out, **options)
    assert [x.dtype for x in values] == [dtype, dtype, torch.float32]
    assert [x.shape for x in values] == [x.shape for x in exact]
    assert_near(values, exact, dtype)
    if masked:
        out, grad, _ = values
        assert (out[~mask] == 0).all()
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize('gamma', [0.9999, 0.9])
def test_states_pass_many_chunks(gamma, triton_device):
    # More chunks than one tile of the scan over them has.
    qkv = qkv_of(2200, 8, device=triton_device, batch=1)
    assert 2200 / decay_chunk(qkv.dtype, 8) > 32
    grad_out = torch.randn(1, 2200, 2, 8, device=triton_device)
    arguments = (qkv, log_decay_of(qkv, (gamma, 1.0)), (44, 50), grad_out)
    assert_near(run(*arguments), truth(*arguments), torch.float32)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gamma', [1.0, 1e-3])
def test_half_precision_neither_overflows_nor_fades(dtype, gamma, triton_device):
    # Without scaling, S and even sums of a few tokens would exceed 65504. With a small loss scale,
    # the gradient of S is near 1e-8.
    qkv = qkv_of(300, 16, dtype=dtype, device=triton_device, batch=1)
    qkv[:, :, :2] = qkv[:, :, :2].abs() * 30
    qkv[:, :, 2] *= 30
    grad_out = torch.randn(1, 300, 2, 16).to(triton_device, dtype) * 2.0**-8
    arguments = (qkv, log_decay_of(qkv, (gamma,)), (20, 15), grad_out)
    # fp16 can't hold all of these gradients: a tiny one has the absolute error of its dtype.
    floor = 2.0**-25 if dtype == torch.float16 else 0.0
    assert_near(run(*arguments), truth(*arguments), dtype, floor)


def test_lonely_queries_see_keys_far_away(triton_device):
    # The weight of every key that these queries see is below what fp16 holds.
    qkv = torch.randn(1, 200, 3, 1, 16)
    qkv[:, :, 0] = qkv[:, :, 0].abs() * 100
    qkv[:, 20:, 1] = -1
    qkv = qkv.to(triton_device, torch.float16)
    grad_out = torch.randn(1, 200, 1, 16).to(qkv)
    arguments = (qkv, log_decay_of(qkv, (0.8,)), (10, 20), grad_out)
    options = dict(feature_map='relu', eps=1e-12)
    out, exact = (f(*arguments, **options)[0] for f in (run, truth))
    assert rms_ratio(out[:, 60:120], exact[:, 60:120]) <= BOUNDS[torch.float16]


@pytest.mark.parametrize('part', range(3))
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_nan_stays_visible(part, feature_map, triton_device):
    qkv = qkv_of(70, 17, device=triton_device, batch=1)
    qkv[0, 3, part, 1, 2] = float('nan')
    log_decay = log_decay_of(qkv)
    options = dict(feature_map=feature_map, impl='triton')
    seen = decay_linear_attention(qkv, log_decay, (7, 10), **options).isnan()
    expected = attend(qkv, log_decay, (7, 10), feature_map, 1e-6, None).isnan()
    assert expected.any()
    assert torch.equal(seen, expected)


def test_masked_tokens_change_nothing_even_when_nan(triton_device):
    qkv = qkv_of(90, 24, device=triton_device)
    mask = torch.rand(2, 90).to(triton_device) > 0.5
    grad_out = torch.randn(2, 90, 2, 24, device=triton_device)
    log_decay = log_decay_of(qkv)
    exact = truth(qkv, log_decay, (9, 10), grad_out, mask=mask)
    qkv[~mask] = float('nan')
    grad_out[~mask] = float('nan')
    values = run(qkv, log_decay, (9, 10), grad_out, mask=mask)
    assert_near(values, exact, torch.float32)
    assert all((value[~mask] == 0).all() for value in values[:2])


def test_all_tokens_masked_gives_zeros(triton_device):
    qkv = qkv_of(20, 8, device=triton_device)
    mask = torch.zeros(2, 20, dtype=torch.bool, device=triton_device)
    grad_out = torch.ones(2, 20, 2, 8, device=triton_device)
    for value in run(qkv, log_decay_of(qkv), (4, 5), grad_out, mask=mask):
        assert (value == 0).all()


@pytest.mark.parametrize(('batch', 'size'), [(0, (2, 5)), (2, (0, 5)), (2, (5, 0))])
def test_empty_input_gives_empty_output_and_zero_gradient(batch, size, triton_device):
    qkv = qkv_of(math.prod(size), 8, device=triton_device, batch=batch)
    grad_out = qkv[:, :, 0]
    out, grad, grad_decay = run(qkv, log_decay_of(qkv), size, grad_out)
    assert (out.shape, grad.shape) == (grad_out.shape, qkv.shape)
    assert torch.equal(grad_decay, torch.zeros_like(grad_decay))


def test_expanded_gradient(triton_device):
    qkv = qkv_of(30, 16, device=triton_device).requires_grad_()
    log_decay = log_decay_of(qkv)
    decay_linear_attention(qkv, log_decay, (5, 6), impl='triton').sum().backward()
    ones = torch.ones(2, 30, 2, 16, device=triton_device)
    assert rms_ratio(qkv.grad, truth(qkv, log_decay, (5, 6), ones)[1]) <= 1e-6


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_dtype_of_log_decay(dtype, triton_device):
    qkv = qkv_of(30, 16, device=triton_device)
    grad_out = torch.randn(2, 30, 2, 16, device=triton_device)
    arguments = (qkv, log_decay_of(qkv).to(dtype), (5, 6), grad_out)
    *values, grad = run(*arguments)
    exact = truth(*arguments)
    assert grad.dtype == dtype
    assert_near((*values, grad.double()), exact, torch.float32, floor=1e-3 * exact[2].max().item())


def test_two_runs_are_bitwise_equal(triton_device):
    qkv = qkv_of(300, 16, device=triton_device)
    grad_out = torch.randn(2, 300, 2, 16, device=triton_device)
    arguments = (qkv, log_decay_of(qkv), (15, 20), grad_out)
    for first, second in zip(run(*arguments), run(*arguments), strict=True):
        assert torch.equal(first, second)


def test_autocast_keeps_the_dtype_as_the_reference_does(triton_device):
    qkv = qkv_of(40, 16, device=triton_device)
    arguments = (qkv, log_decay_of(qkv), (5, 8))
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        out = decay_linear_attention(*arguments, impl='triton')
    assert torch.equal(out, decay_linear_attention(*arguments, impl='triton'))


def test_flops_are_counted(triton_device):
    qkv = qkv_of(100, 16, device=triton_device).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        decay_linear_attention(qkv, log_decay_of(qkv), (10, 10), impl='triton').sum().backward()
    # Products of tokens with states, and with the tokens of their chunk.
    products = 12 * 16 + 8 * decay_chunk(qkv.dtype, 16)
    assert counter.get_total_flops() == products * 2 * 2 * 100 * 2 * 16


@pytest.mark.parametrize(
    ('qkv', 'reason'),
    [
        (torch.zeros(1, 4, 3, 1, 8, dtype=torch.float64), 'not torch.float64'),
        (torch.zeros(1, 4, 3, 1, 129), 'head dims 8 to 128, not 129'),
        (torch.zeros(1, 16, 3, 1, 4).transpose(1, 4), 'last axis of the input is not contiguous'),
    ],
)
def test_what_triton_does_not_take(qkv, reason, triton_device):
    qkv = qkv.to(triton_device)
    log_decay = torch.zeros(1, device=triton_device)
    with pytest.raises(RuntimeError, match=reason):
        decay_linear_attention(qkv, log_decay, (2, 2), impl='triton')
    assert decay_linear_attention(qkv, log_decay, (2, 2)).shape == (1, 4, 1, qkv.shape[-1])


LARGE_ADDRESSES = """
import torch
from saga_kernels import decay_linear_attention
strides = {strides}
last = 2 * strides[1] + 2 * strides[2] + strides[3]
memory = torch.empty(last + 8, dtype=torch.float16, device='{device}')
qkv = memory.as_strided((1, 3, 3, 2, 8), strides)
values = torch.randn(qkv.shape).to(qkv)
qkv.copy_(values)
log_decay = torch.full((2,), -0.5, device='{device}', requires_grad=True)
results = []
for x in qkv, values:
    x = x.detach().requires_grad_()
    out = decay_linear_attention(x, log_decay, (1, 3), impl='triton')
    grad_out = torch.arange(48).view(out.shape).to(out)
    results.append((out, *torch.autograd.grad(out, (x, log_decay), grad_out)))
assert all(torch.equal(value, expected) for value, expected in zip(*results, strict=True))
"""


@pytest.mark.parametrize('strides', [(16, 1_100_000_000, 16, 8, 1), (16, 16, 1_100_000_000, 8, 1)])
def test_addresses_past_2_31(strides, triton_device):
    # In a process of its own, which a wrong offset may crash. Only touched pages take memory.
    script = LARGE_ADDRESSES.format(strides=strides, device=triton_device)
    subprocess.run([sys.executable, '-c', script], check=True)
