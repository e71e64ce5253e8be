"""Tests that need a GPU. The other Triton tests also run on one if there is one."""

import math

import pytest
import torch

from harness import BOUNDS, capture, rms_ratio
from saga_kernels import (
    bidirectional_wkv,
    decay_linear_attention,
    gated_linear_attention,
    linear_attention,
    rank_augmented_linear_attention,
)
from saga_kernels.decay.eager import attend as attend_decay
from saga_kernels.gated.reference import attend
from saga_kernels.rank_augmented.reference import attend as attend_rank_augmented

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def packed_of(tokens, dim, dtype=torch.bfloat16, heads=2, parts=5):
    return torch.randn(1, tokens, parts, heads, dim, device='cuda').to(dtype)


def image_of(packed):
    """The size of a map, as square as possible, and its frequencies."""
    tokens, dim = packed.shape[1], packed.shape[-1]
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    frequencies = 10000 ** -torch.linspace(0, 1, dim // 4, device=packed.device)
    return (height, tokens // height), frequencies


def rank_augmented(packed, impl='auto'):
    return rank_augmented_linear_attention(packed, *image_of(packed), impl=impl)


def log_decay_of(packed):
    """Decay to 1 / e after 4 tokens in the first head, and after 4,000 in the last one.

    No tensor is made from Python numbers, which would be an error in a CUDA graph.
    """
    return torch.linspace(-1 / 4, -1 / 4000, packed.shape[3], device=packed.device)


def decay(packed, impl='auto'):
    return decay_linear_attention(packed, log_decay_of(packed), image_of(packed)[0], impl=impl)


def wkv(packed, impl='auto'):
    k, v = packed[:, :, 1:].flatten(3).unbind(2)
    w = torch.linspace(0, 1, k.shape[2], device=k.device)
    out = bidirectional_wkv(k, v, w, w, decay_per='token', impl=impl)
    return out.unflatten(2, packed.shape[3:])


OPS = [(gated_linear_attention, 5), (rank_augmented, 3), (decay, 3), (wkv, 3)]


def forward_backward(op, packed, grad_out):
    packed = packed.detach().requires_grad_()
    out = op(packed)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    return out.detach(), grad


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('dim', [17, 32, 64, 128])
@pytest.mark.parametrize('parts', [3, 5])
def test_a_large_image_against_float64(dtype, dim, parts):
    packed = packed_of(102400, dim, dtype, parts=parts)
    grad_out = torch.randn(1, 102400, 2, dim, device='cuda').to(dtype)
    op = gated_linear_attention if parts == 5 else linear_attention
    values = forward_backward(lambda x: op(x, impl='triton'), packed, grad_out)
    exact = forward_backward(
        lambda x: attend(x, 'elu', 1e-6, None), packed.double(), grad_out.double()
    )
    for value, truth in zip(values, exact, strict=True):
        assert rms_ratio(value, truth) <= BOUNDS[dtype]


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('dim', [20, 32, 64, 128])
def test_rank_augmented_over_a_large_image_against_float64(dtype, dim):
    packed = packed_of(102400, dim, dtype, parts=3)
    grad_out = torch.randn(1, 102400, 2, dim, device='cuda').to(dtype)
    values = forward_backward(rank_augmented, packed, grad_out)
    exact = forward_backward(
        lambda x: attend_rank_augmented(x, *image_of(x), 1e-6, None),
        packed.double(),
        grad_out.double(),
    )
    for value, truth in zip(values, exact, strict=True):
        assert rms_ratio(value, truth) <= BOUNDS[dtype]


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('dim', [17, 32, 64, 128])
def test_decay_over_a_large_image_against_float64(dtype, dim):
    packed = packed_of(102400, dim, dtype, parts=3)
    grad_out = torch.randn(1, 102400, 2, dim, device='cuda').to(dtype)
    size, _ = image_of(packed)
    values, exact = [], []
    for results, x, attention in (
        (values, packed, lambda *args: decay_linear_attention(*args, size, impl='triton')),
        (exact, packed.double(), lambda *args: attend_decay(*args, size, 'elu', 1e-6, None)),
    ):
        leaves = x.requires_grad_(), log_decay_of(x).requires_grad_()
        out = attention(*leaves)
        results += out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype))
    # The gradient of log_decay is one sum per head over terms of both signs.
    for value, truth, factor in zip(values, exact, (1, 1, 10), strict=True):
        assert rms_ratio(value, truth) <= factor * BOUNDS[dtype]


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('channels', [96, 100])
@pytest.mark.parametrize('masked', [False, True])
def test_wkv_over_a_large_image_against_float64(dtype, channels, masked):
    k, v, grad_out = torch.randn(3, 1, 102400, channels, device='cuda').to(dtype)
    w, u = torch.rand(2, channels, device='cuda') * 20
    mask = torch.rand(1, 102400, device='cuda') > 0.3 if masked else None
    values, exact = [], []
    for results, impl, kind in (values, 'triton', dtype), (exact, 'reference', torch.float64):
        parameters = torch.float64 if kind == torch.float64 else torch.float32
        leaves = k.to(kind), v.to(kind), w.to(parameters), u.to(parameters)
        leaves = [x.requires_grad_() for x in leaves]
        out = bidirectional_wkv(*leaves, mask=mask, impl=impl)
        results += out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(kind))
    # Those of w and u are sums over all tokens, of terms of both signs.
    for value, truth, factor in zip(values, exact, (2, 2, 2, 5, 5), strict=True):
        assert rms_ratio(value, truth) <= factor * BOUNDS[dtype]


@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_auto_takes_the_kernel(op, parts):
    packed = packed_of(1000, 64, parts=parts)
    assert torch.equal(op(packed), op(packed, impl='triton'))


@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_a_hundred_runs_are_bitwise_equal(op, parts):
    packed = packed_of(50_000, 64, parts=parts)
    grad_out = torch.randn(1, 50_000, 2, 64, device='cuda').bfloat16()
    first = forward_backward(op, packed, grad_out)
    for _ in range(100):
        again = forward_backward(op, packed, grad_out)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_mixed_precision_training_step(dtype, op, parts):
    projection = torch.nn.Linear(64, parts * 64, device='cuda')
    optimizer = torch.optim.SGD(projection.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler('cuda', enabled=dtype == torch.float16)
    x = torch.randn(2, 3136, 64, device='cuda')
    before = projection.weight.detach().clone()
    with torch.autocast('cuda', dtype=dtype):
        out = op(projection(x).unflatten(-1, (parts, 2, 32)))
    assert out.dtype == dtype
    scaler.scale(out.float().square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert projection.weight.isfinite().all()
    assert not torch.equal(projection.weight, before)


@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_cuda_graph(op, parts):
    packed = packed_of(3136, 64, parts=parts).requires_grad_()
    grad_out = torch.randn(1, 3136, 2, 64, device='cuda').bfloat16()

    def step():
        out = op(packed)
        return out, *torch.autograd.grad(out, packed, grad_out)

    graph, captured = capture(step)
    with torch.no_grad():
        packed.copy_(torch.randn_like(packed))
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_inductor_without_a_graph_break(op, parts):
    projection = torch.nn.Linear(64, parts * 64, device='cuda', dtype=torch.bfloat16)

    def block(x):
        return op(projection(x).unflatten(-1, (parts, 1, 64))).flatten(-2)

    x = torch.randn(1, 3136, 64, device='cuda', dtype=torch.bfloat16)
    compiled = torch.compile(block, fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x), rtol=2e-2, atol=2e-2)
    compiled(x).sum().backward()
    assert projection.weight.grad.isfinite().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
@pytest.mark.parametrize(('op', 'parts'), OPS)
def test_a_tensor_on_another_gpu(op, parts):
    packed = packed_of(100, 32, parts=parts)
    out = op(packed.to('cuda:1'))
    assert torch.equal(out.to('cuda:0'), op(packed))
