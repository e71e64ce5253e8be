"""The Triton kernels agree with the reference in float64, which has its own tests.

They run on a GPU if there is one, and in Triton's interpreter otherwise.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import bidirectional_wkv
from saga_kernels.launch import WKV_CHUNK
from saga_kernels.wkv.reference import attend


def inputs(tokens, channels=3, *, batch=2, dtype=torch.float32, device='cpu', w=0.1, scale=1.0):
    k, v = torch.randn(2, batch, tokens, channels)
    rate, u = torch.linspace(0, w, channels), torch.randn(channels)
    return [(scale * k).to(device, dtype), v.to(device, dtype), rate.to(device), u.to(device)]


def run(x, grad_out, **options):
    """Output and gradients of k, v, w and u of the Triton op."""
    x = [part.detach().requires_grad_() for part in x]
    out = bidirectional_wkv(*x, impl='triton', **options)
    return out.detach(), *torch.autograd.grad(out, x, grad_out)


def truth(x, grad_out, decay_per='image', mask=None):
    k, v, w, u = x = [part.detach().double().requires_grad_() for part in x]
    count = 1
    if decay_per == 'image':
        count = k.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    out = attend(k, v, w[None] / count, u[None] / count, mask)
    return out.detach(), *torch.autograd.grad(out, x, grad_out.double())


def assert_near(values, exact, dtype):
    # Those of w and u are sums over all tokens, of terms of both signs.
    for value, expected, factor in zip(values, exact, (1, 1, 1, 5, 5), strict=True):
        error, size = (value.double() - expected).norm().item(), expected.norm().item()
        assert error <= factor * BOUNDS[dtype] * size + 1e-6


CASES = pairwise(
    tokens=(1, 7, 49, WKV_CHUNK, 150),
    channels=(1, 8, 17),
    dtype=tuple(BOUNDS),
    w=(0.1, 30.0),
    decay_per=('image', 'token'),
    masked=(False, True),
    strided=(False, True),
)


@pytest.mark.parametrize(
    ('tokens', 'channels', 'dtype', 'w', 'decay_per', 'masked', 'strided'), CASES
)
def test_equals_reference_in_float64(
    tokens, channels, dtype, w, decay_per, masked, strided, triton_device
):
    batch = 2 if channels == 1 else 1
    x = inputs(tokens, channels, batch=batch, dtype=dtype, device=triton_device, w=w)
    grad_out = torch.randn(batch, tokens, channels).to(triton_device, dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, tokens, device=triton_device) > 0.3
        mask[:, 0] = True
    if strided:
        # Parts of one projection, every other token.
        wide = torch.randn(batch, 2 * tokens, 2 * channels + 1).to(triton_device, dtype)
        x[:2] = wide[:, ::2].split([channels, channels + 1], 2)
        x[1] = x[1][:, :, 1:]
        x[2:] = (part.repeat_interleave(2)[::2] for part in x[2:])
        grad_out = grad_out.transpose(0, 1).contiguous().transpose(0, 1)
        if masked:
            mask = mask.t().contiguous().t()
    values = run(x, grad_out, decay_per=decay_per, mask=mask)
    exact = truth(x, grad_out, decay_per, mask)
    assert [value.dtype for value in values] == [dtype] * 3 + [torch.float32] * 2
    assert [value.shape for value in values] == [value.shape for value in exact]
    assert_near(values, exact, dtype)
    if masked:
        assert all((value[~mask] == 0).all() for value in values[:3])


@pytest.mark.parametrize('masked', [False, True])
def test_states_pass_many_chunks(masked, triton_device):
    # More chunks than a tile of the scan over them has, with a decay that reaches over all of them.
    tokens = 300 * WKV_CHUNK if triton_device == 'cuda' else 3 * WKV_CHUNK
    x = inputs(tokens, 2, batch=1, device=triton_device, w=3.0)
    mask = torch.rand(1, tokens, device=triton_device) > 0.5 if masked else None
    grad_out = torch.randn_like(x[0])
    values = run(x, grad_out, mask=mask)
    x = [part.double().requires_grad_() for part in x]
    out = bidirectional_wkv(*x, mask=mask)
    exact = out.detach(), *torch.autograd.grad(out, x, grad_out.double())
    assert_near(values, exact, torch.float32)


def test_the_scan_goes_on_after_a_tile(triton_device, monkeypatch):
    from saga_kernels.wkv import kernel

    monkeypatch.setattr(kernel, 'tile_config', lambda *args: (2, 1))
    x = inputs(3 * WKV_CHUNK - 7, 2, batch=1, device=triton_device, w=3.0)
    grad_out = torch.randn_like(x[0])
    assert_near(run(x, grad_out), truth(x, grad_out), torch.float32)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('decay_per', ['image', 'token'])
@pytest.mark.parametrize('masked', [False, True])
def test_extreme_exponents(dtype, decay_per, masked, triton_device):
    k = torch.empty(1, 75, 6).uniform_(-1e4, 1e4).to(triton_device, dtype)
    v = torch.randn(1, 75, 6).to(triton_device, dtype)
    w = torch.tensor([0, 1e-3, 1, 1e2, 1e4, 1e4], device=triton_device)
    u = torch.tensor([-1e4, 1e4, 0, 1e4, -1e4, 1], device=triton_device)
    mask = torch.rand(1, 75, device=triton_device) > 0.5 if masked else None
    x, grad_out = (k, v, w, u), torch.randn_like(v)
    values = run(x, grad_out, decay_per=decay_per, mask=mask)
    exact = truth(x, grad_out, decay_per, mask)
    assert all(value.isfinite().all() for value in values)
    # Differences of exponents have an error of 1e-3 in float32.
    for value, expected in zip(values[:3], exact[:3], strict=True):
        error = (value.double() - expected).abs()
        assert (error <= (2e-3 + BOUNDS[dtype]) * expected.abs().max().clamp(min=1)).all()


def test_rounding_does_not_add_up_over_the_tokens(triton_device):
    # A decay that is small beside the exponents: each step of a running maximum is rounded.
    k, v, w, u = inputs(250, 2, batch=1, device=triton_device, w=7.0)
    x, grad_out = (k + 1000, v, w, u), torch.randn_like(v)
    assert_near(run(x, grad_out), truth(x, grad_out), torch.float32)


@pytest.mark.parametrize('part', range(2))
def test_nan_stays_visible(part, triton_device):
    x = inputs(75, device=triton_device)
    x[part][0, 3, 2] = torch.nan
    seen = bidirectional_wkv(*x, impl='triton').isnan()
    expected = attend(*x[:2], x[2][None], x[3][None], None).isnan()
    assert expected[0, :, 2].all()
    assert torch.equal(seen, expected)


def test_masked_tokens_change_nothing_even_when_nan(triton_device):
    x = inputs(70, device=triton_device)
    mask = torch.rand(2, 70, device=triton_device) > 0.5
    grad_out = torch.randn(2, 70, 3, device=triton_device)
    exact = truth(x, grad_out, mask=mask)
    for part in (*x[:2], grad_out):
        part[~mask] = float('nan')
    values = run(x, grad_out, mask=mask)
    assert_near(values, exact, torch.float32)
    assert all((value[~mask] == 0).all() for value in values[:3])


def test_all_tokens_masked_gives_zeros(triton_device):
    x = inputs(20, device=triton_device)
    x[3] *= 1e4
    mask = torch.zeros(2, 20, dtype=torch.bool, device=triton_device)
    grad_out = torch.ones(2, 20, 3, device=triton_device)
    for decay_per in ('image', 'token'):
        for value in run(x, grad_out, decay_per=decay_per, mask=mask):
            assert (value == 0).all()


@pytest.mark.parametrize(('batch', 'tokens'), [(0, 10), (2, 0)])
def test_empty_input_gives_empty_output_and_zero_gradient(batch, tokens, triton_device):
    x = inputs(tokens, batch=batch, device=triton_device)
    out, *grads = run(x, x[0])
    assert out.shape == (batch, tokens, 3)
    assert all(torch.equal(a, torch.zeros_like(b)) for a, b in zip(grads, x, strict=True))


def test_expanded_gradient(triton_device):
    x = inputs(30, device=triton_device)
    leaves = [part.requires_grad_() for part in x]
    bidirectional_wkv(*leaves, impl='triton').sum().backward()
    exact = truth(x, torch.ones(2, 30, 3, device=triton_device))[1:]
    for leaf, expected in zip(leaves[1:], exact[1:], strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_dtypes_of_w_and_u(triton_device):
    k, v, w, u = inputs(40, dtype=torch.bfloat16, device=triton_device)
    x = k, v, w.double(), u.to(torch.bfloat16)
    grad_out = torch.randn_like(k)
    values = run(x, grad_out)
    assert [value.dtype for value in values] == [part.dtype for part in (k, *x)]
    assert_near(values, truth(x, grad_out), torch.bfloat16)


def test_two_runs_are_bitwise_equal(triton_device):
    x = inputs(75, batch=1, device=triton_device)
    grad_out = torch.randn_like(x[0])
    assert all(map(torch.equal, run(x, grad_out), run(x, grad_out)))


def test_autocast_keeps_the_dtype_as_the_reference_does(triton_device):
    x = inputs(40, device=triton_device)
    with torch.autocast(triton_device, dtype=torch.bfloat16):
        out = bidirectional_wkv(*x, impl='triton')
    assert torch.equal(out, bidirectional_wkv(*x, impl='triton'))


def test_flops_are_counted(triton_device):
    x = [part.requires_grad_() for part in inputs(20, device=triton_device)]
    with FlopCounterMode(display=False) as counter:
        bidirectional_wkv(*x, impl='triton').sum().backward()
    # Multiplications and additions per token and channel: forward 6, backward 10.
    assert counter.get_total_flops() == 2 * 16 * 2 * 20 * 3


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda x: x.double(), 'not torch.float64'),
        (lambda x: x.repeat_interleave(2, 2)[..., ::2], 'last axis of the input is not contiguous'),
    ],
)
def test_what_triton_does_not_take(change, reason, triton_device):
    k, v, w, u = inputs(20, device=triton_device)
    k, v = change(k), change(v)
    with pytest.raises(RuntimeError, match=reason):
        bidirectional_wkv(k, v, w, u, impl='triton')
    assert bidirectional_wkv(k, v, w, u).shape == v.shape
    if k.dtype == w.dtype:
        with pytest.raises(RuntimeError, match=reason):
            bidirectional_wkv(k.contiguous(), v, w, u, impl='triton')


DERIVATIVES = {
    'jvp': lambda op, x: torch.func.jvp(op, (x,), (x,))[1],
    'grad': lambda op, x: torch.func.grad(lambda x: op(x).sin().sum())(x),
}


@pytest.mark.parametrize('name', DERIVATIVES)
@pytest.mark.parametrize('part', range(4))
def test_the_kernels_refuse_derivatives_that_they_lack(name, part, triton_device):
    x = inputs(20, device=triton_device, w=1.0)

    def op(value, impl):
        return bidirectional_wkv(*x[:part], value, *x[part + 1 :], impl=impl)

    derivative = DERIVATIVES[name]
    with pytest.raises(RuntimeError, match='the derivatives of forward mode'):
        derivative(lambda value: op(value, 'triton'), x[part])
    # With impl='auto', the op uses the implementation in PyTorch.
    expected = derivative(lambda value: op(value, 'reference'), x[part])
    torch.testing.assert_close(derivative(lambda value: op(value, 'auto'), x[part]), expected)


LARGE_ADDRESSES = """
import torch
from saga_kernels import bidirectional_wkv
strides = {strides}
memory = torch.empty(sum(strides) + 8, dtype=torch.float16, device='{device}')
k = memory.as_strided((2, 2, 3), (*strides, 1))
values = torch.randn(k.shape).to(k)
k.copy_(values)
w = torch.full((3,), 0.5, device='{device}')
results = []
for x in k, values:
    x = x.detach().requires_grad_()
    out = bidirectional_wkv(x, x, w, w, impl='triton')
    grad_out = torch.arange(12).view(out.shape).to(out)
    results.append((out, *torch.autograd.grad(out, x, grad_out)))
assert all(torch.equal(value, expected) for value, expected in zip(*results, strict=True))
"""


@pytest.mark.parametrize('strides', [(3, 2_200_000_000), (2_200_000_000, 3)])
def test_addresses_past_2_31(strides, triton_device):
    # In a process of its own, which a wrong offset may crash. Only touched pages take memory.
    script = LARGE_ADDRESSES.format(strides=strides, device=triton_device)
    subprocess.run([sys.executable, '-c', script], check=True)


@pytest.mark.parametrize('masked', [False, True])
def test_equals_the_eager_implementation(masked, triton_device):
    x = inputs(140, 20, batch=1, device=triton_device)
    mask = torch.rand(1, 140, device=triton_device) > 0.5 if masked else None
    out = bidirectional_wkv(*x, mask=mask, impl='triton')
    assert rms_ratio(out, bidirectional_wkv(*x, mask=mask, impl='reference')) < 1e-6
