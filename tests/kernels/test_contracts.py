"""What torch and its users expect of every op besides its values."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from saga_kernels import (
    decay_linear_attention,
    gated_linear_attention,
    linear_attention,
    rank_augmented_linear_attention,
)
from saga_kernels.dispatch import why_not_triton

HEADS, DIM = 2, 8


def one_part(packed):
    """A tensor (..., H, D), also if the parts come apart."""
    return packed if isinstance(packed, torch.Tensor) else packed[0]


def plain(packed, size, **options):
    return linear_attention(packed, **options)


def gated(packed, size, **options):
    return gated_linear_attention(packed, **options)


def rank_augmented(packed, size, **options):
    like = one_part(packed)
    frequencies = torch.ones(like.shape[-1] // 4, device=like.device)
    return rank_augmented_linear_attention(packed, size, frequencies, **options)


def decay(packed, size, **options):
    like = one_part(packed)
    log_decay = torch.full((like.shape[-2],), -0.1, device=like.device)
    return decay_linear_attention(packed, log_decay, size, **options)


# Parts of the packed projection, and the op.
OPS = {
    'gated': (5, gated),
    'plain': (3, plain),
    'rank_augmented': (3, rank_augmented),
    'decay': (3, decay),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def packed_of(parts, size, *, batch=1, heads=HEADS, dim=DIM, **options):
    return torch.randn(batch, math.prod(size), parts, heads, dim, **options)


@pytest.mark.parametrize('kind', [tuple, list])
def test_the_parts_may_come_apart(op, kind):
    parts, attend = op
    packed = packed_of(parts, (5, 7), batch=2).requires_grad_()
    mask = torch.rand(2, 35) > 0.3
    expected = attend(packed, (5, 7), mask=mask)
    grad_out = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, packed, grad_out)
    apart = kind(part.detach().clone().requires_grad_() for part in packed.unbind(2))
    out = attend(apart, (5, 7), mask=mask)
    assert torch.equal(out, expected)
    assert torch.equal(torch.stack(torch.autograd.grad(out, apart, grad_out), 2), grad)


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (lambda x: x[:-1], r'must be \d tensors \(B, N, H, D\) of one shape'),
        (lambda x: [*x[:-1], x[-1][..., :4]], r'got .*\(1, 35, 2, 4\) torch.float32 cpu$'),
        (lambda x: [*x[:-1], x[-1].double()], r'got .*\(1, 35, 2, 8\) torch.float64 cpu$'),
        (lambda x: [*x[:-1], None], 'NoneType$'),
        (lambda x: [part[0] for part in x], r'got \(35, 2, 8\)'),
    ],
)
def test_wrong_parts_are_one_line(op, change, expected):
    parts, attend = op
    apart = change(list(packed_of(parts, (5, 7)).unbind(2)))
    with pytest.raises(ValueError, match=expected):
        attend(apart, (5, 7))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('autocast', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('with_grad', [False, True])
def test_autocast_to_another_dtype_changes_nothing(op, dtype, autocast, with_grad):
    parts, attend = op
    size = (100, 100)
    packed = packed_of(parts, size, heads=4, dim=32).to(dtype).requires_grad_(with_grad)
    with torch.set_grad_enabled(with_grad):
        expected = attend(packed, size)
        with torch.autocast('cpu', dtype=autocast):
            out = attend(packed, size)
    assert torch.equal(out, expected)
    if with_grad:
        out.sum().backward()
        assert packed.grad.isfinite().all()


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_masked_tokens_have_no_part_in_gradients_whatever_they_hold(op, value):
    parts, attend = op
    size = (10, 12)
    packed = packed_of(parts, size, dtype=torch.float64)
    mask = torch.rand(1, 120) > 0.4
    grad_out = torch.randn(1, 120, HEADS, DIM, dtype=torch.float64)
    filled = [x.clone() for x in (packed, grad_out)]
    for x in filled:
        x[~mask] = value
    results = []
    for x, grad in (packed, grad_out), filled:
        x = x.requires_grad_()
        out = attend(x, size, mask=mask)
        results.append((out, *torch.autograd.grad(out, x, grad)))
    (out, grad), (expected, expected_grad) = reversed(results)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert (grad[~mask] == 0).all()


def test_meta_device(op):
    parts, attend = op
    packed = packed_of(parts, (10, 10), device='meta').requires_grad_()
    mask = torch.ones(1, 100, dtype=torch.bool, device='meta')
    out = attend(packed, (10, 10), mask=mask)
    assert (out.shape, out.device.type) == ((1, 100, HEADS, DIM), 'meta')
    out.sum().backward()
    with torch.no_grad():
        assert attend(packed, (10, 10)).shape == out.shape


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a GPU that is not there')
def test_fake_tensor_on_a_gpu_that_is_not_there():
    pytest.importorskip('triton')
    with FakeTensorMode():
        assert why_not_triton(packed_of(5, (10, 10), device='cuda')) == 'there is no GPU'


@pytest.mark.parametrize('with_grad', [False, True])
@pytest.mark.parametrize('budget', [2**21, 2**10])
def test_vmap(op, with_grad, budget, chunk_budget):
    parts, attend = op
    chunk_budget(budget)
    packed = torch.stack([packed_of(parts, (10, 10), dtype=torch.float64) for _ in range(3)])

    def one(x):
        return attend(x, (10, 10))

    def gradient(x):
        return torch.func.grad(lambda x: one(x).sin().sum())(x)

    with torch.set_grad_enabled(with_grad):
        for function in (one, gradient):
            expected = torch.stack([function(x) for x in packed])
            torch.testing.assert_close(torch.func.vmap(function)(packed), expected)


@pytest.mark.parametrize('with_grad', [False, True])
@pytest.mark.parametrize('budget', [2**21, 2**10])
def test_forward_mode(op, with_grad, budget, chunk_budget):
    parts, attend = op
    chunk_budget(budget)
    packed = packed_of(parts, (10, 10), dtype=torch.float64)
    tangent = torch.randn_like(packed)
    step = 1e-6 * tangent
    difference = attend(packed + step, (10, 10)) - attend(packed - step, (10, 10))
    with torch.set_grad_enabled(with_grad):
        _, derivative = torch.func.jvp(lambda x: attend(x, (10, 10)), (packed,), (tangent,))
        with forward_ad.dual_level():
            out = attend(forward_ad.make_dual(packed, tangent), (10, 10))
            also = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(derivative, difference / 2e-6, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(also, derivative)


def forward_mode(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


DERIVATIVES = {
    'jvp': lambda function, x: torch.func.jvp(function, (x,), (x,))[1],
    'jvp of vmap': lambda function, x: torch.func.jvp(torch.func.vmap(function), (x,), (x,))[1],
    'forward_ad': forward_mode,
    'grad': lambda function, x: torch.func.grad(lambda x: function(x).sin().sum())(x),
}


@pytest.mark.parametrize('name', DERIVATIVES)
def test_the_kernels_refuse_derivatives_that_they_lack(op, name, triton_device):
    parts, attend = op
    derivative = DERIVATIVES[name]
    packed = packed_of(parts, (4, 5), device=triton_device)
    if name == 'jvp of vmap':
        packed = packed[None]
    with pytest.raises(RuntimeError, match='the derivatives of forward mode'):
        derivative(lambda x: attend(x, (4, 5), impl='triton'), packed)
    # With impl='auto', the op uses the reference.
    value = derivative(lambda x: attend(x, (4, 5)), packed)
    expected = derivative(lambda x: attend(x, (4, 5), impl='reference'), packed)
    torch.testing.assert_close(value, expected)


def test_a_kernel_called_by_its_name_refuses_forward_mode(triton_device):
    packed = packed_of(5, (4, 5), device=triton_device)
    with pytest.raises(RuntimeError, match='the derivatives of forward mode'):
        forward_mode(
            lambda x: torch.ops.saga_kernels.gated_forward(x, None, 'elu', 1e-6)[0], packed
        )


@pytest.mark.parametrize('integer', [np.int64, np.int32, torch.tensor])
@pytest.mark.parametrize('impl', ['reference', 'triton'])
def test_numbers_of_other_kinds(op, integer, impl, triton_device):
    parts, attend = op
    packed = packed_of(parts, (4, 5), device=triton_device)
    size = integer(4), integer(5)
    out = attend(packed, size, eps=np.float32(0.5), impl=impl)
    assert torch.equal(out, attend(packed, (4, 5), eps=0.5, impl=impl))


@pytest.mark.parametrize('eps', [1e-46, 0, -1.0, math.nan, math.inf, '1e-6', None, 1j])
def test_eps_must_be_a_positive_float32(op, eps):
    parts, attend = op
    with pytest.raises(ValueError, match='eps must be') as error:
        attend(packed_of(parts, (4, 5)), (4, 5), eps=eps)
    assert '\n' not in str(error.value)


def test_the_smallest_eps(op):
    parts, attend = op
    packed = packed_of(parts, (4, 5)).abs()
    out = attend(packed, (4, 5), eps=1.4e-45)
    torch.testing.assert_close(out, attend(packed, (4, 5)))
    if parts == 3:
        # A token that sees no key has an output of zero, not of 0 / 0.
        mask = torch.zeros(1, 20, dtype=torch.bool)
        assert (attend(packed, (4, 5), eps=1.4e-45, mask=mask) == 0).all()


@pytest.mark.parametrize(('batch', 'size'), [(0, (10, 10)), (0, (0, 5)), (2, (0, 5)), (2, (5, 0))])
@pytest.mark.parametrize('heads', [1, 2, 3])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('with_grad', [False, True])
def test_empty_input(op, batch, size, heads, masked, with_grad):
    parts, attend = op
    packed = packed_of(parts, size, batch=batch, heads=heads).requires_grad_(with_grad)
    mask = torch.ones(packed.shape[:2], dtype=torch.bool) if masked else None
    with torch.set_grad_enabled(with_grad):
        out = attend(packed, size, mask=mask)
    assert out.shape == (batch, math.prod(size), heads, DIM)
    if with_grad:
        out.sum().backward()
        assert packed.grad.shape == packed.shape


class Map(torch.nn.Module):
    """An op over a map (B, height, width, parts * HEADS * DIM), as a backbone calls it."""

    def __init__(self, attend):
        super().__init__()
        self.attend = attend

    def forward(self, x, mask=None):
        batch, height, width, channels = x.shape
        packed = x.reshape(batch, height * width, channels // (HEADS * DIM), HEADS, DIM)
        mask = None if mask is None else mask.reshape(batch, height * width)
        out = self.attend(packed, (height, width), mask=mask)
        return out.reshape(batch, height, width, HEADS * DIM)


def map_of(parts, height, width, masked, batch=1):
    x = torch.randn(batch, height, width, parts * HEADS * DIM)
    return (x, torch.rand(batch, height, width) > 0.3) if masked else (x,)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('with_grad', [False, True])
def test_a_trace_holds_for_other_sizes(op, masked, with_grad, chunk_budget):
    parts, attend = op
    chunk_budget(2**10)
    module = Map(attend)
    with torch.set_grad_enabled(with_grad), warnings.catch_warnings():
        # A value that the trace would record as a constant.
        warnings.simplefilter('error', torch.jit.TracerWarning)
        # The test's own frequencies and rates are constants.
        warnings.filterwarnings('ignore', message='.*are registered as constants')
        traced = torch.jit.trace(module, map_of(parts, 9, 10, masked), check_trace=False)
    for batch, height, width in ((1, 3, 5), (2, 20, 30)):
        x = map_of(parts, height, width, masked, batch)
        torch.testing.assert_close(traced(*x), module(*x))


@pytest.mark.parametrize('masked', [False, True])
def test_the_torchscript_exporter_to_onnx(op, masked, tmp_path):
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    parts, attend = op
    module, file = Map(attend), tmp_path / 'op.onnx'
    names = ['x', 'mask'][: 1 + masked]
    axes = {name: {0: 'batch', 1: 'height', 2: 'width'} for name in names}
    options = dict(dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17)
    torch.onnx.export(module, map_of(parts, 9, 10, masked), file, **options)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for batch, height, width in ((1, 9, 10), (1, 3, 5), (2, 20, 30)):
        inputs = map_of(parts, height, width, masked, batch)
        arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        (out,) = session.run(None, arrays)
        torch.testing.assert_close(torch.from_numpy(out), module(*inputs))


# This runs without the fixtures of the tests, as in a user's process.
BFLOAT16 = """
import torch
from saga_kernels import gated_linear_attention
torch.manual_seed(0)
packed = torch.randn(1, 300, 5, 2, 16).bfloat16()
out = gated_linear_attention(packed, impl='triton')
exact = gated_linear_attention(packed.double())
print(((out - exact).norm() / exact.norm()).item())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs the interpreter')
def test_bfloat16_is_right_in_the_interpreter(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    command = [sys.executable, '-c', BFLOAT16]
    error = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert error < 5e-3


@pytest.mark.parametrize('key', [-89, -90, -96, -103, -104])
@pytest.mark.parametrize('channels', [slice(2, 4), slice(None)])
def test_keys_whose_features_are_denormal(key, channels, triton_device):
    packed = packed_of(3, (6, 7), device=triton_device)
    packed[:, :, 1, 0, channels] = key
    grad_out = torch.randn(packed[:, :, 0].shape, device=triton_device)
    results = []
    for x, impl in (packed, 'triton'), (packed.double(), 'reference'):
        x.requires_grad_()
        out = rank_augmented(x, (6, 7), impl=impl)
        (grad,) = torch.autograd.grad(out, x, grad_out.to(out.dtype))
        results.append((out.double(), grad.double()))
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)
