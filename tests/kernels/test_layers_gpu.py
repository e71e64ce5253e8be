"""Tests of the kernels around attention that need a GPU."""

import pytest
import torch
from torch import Tensor

from harness import BOUNDS, capture, rms_ratio
from saga_kernels import depthwise_conv2d, ffn, gated_attention, layer_norm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def conv_of(side):
    """LePE: a convolution of v in a packed projection, added to the first part."""

    def op(packed: Tensor, impl: str = 'auto', dtype: torch.dtype | None = None) -> Tensor:
        out, _, value = packed.chunk(3, -1)
        channels = value.shape[-1]
        scale = torch.linspace(-1, 1, channels * side**2, device=packed.device)
        weight = scale.view(channels, 1, side, side).to(dtype or torch.float32)
        bias = scale[:channels].to(weight.dtype)
        return depthwise_conv2d(value, weight, bias, add=out, impl=impl)

    return op


def residual(packed: Tensor, impl: str = 'auto', dtype: torch.dtype | None = None) -> Tensor:
    weight = torch.linspace(-1, 1, packed.shape[-1] * 9, device=packed.device)
    weight = weight.view(-1, 1, 3, 3).to(dtype or torch.float32)
    return depthwise_conv2d(packed, weight, add=packed, impl=impl)


def norm(packed: Tensor, impl: str = 'auto', dtype: torch.dtype | None = None) -> Tensor:
    weight = torch.linspace(-1, 1, packed.shape[-1], device=packed.device)
    weight = weight.to(dtype or torch.float32)
    return layer_norm(packed, weight, weight, impl=impl)


OPS = {'3 x 3': conv_of(3), '5 x 5': conv_of(5), 'residual': residual, 'norm': norm}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def packed_of(dtype=torch.bfloat16, height=127, width=83, channels=192):
    return torch.randn(2, height, width, channels, device='cuda').to(dtype)


def forward_backward(op, packed, grad_out=None):
    packed = packed.detach().requires_grad_()
    out = op(packed)
    grad_out = torch.sin(torch.arange(out.numel(), device='cuda')).view(out.shape).to(out.dtype)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    return out.detach(), grad


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('channels', [60, 192, 960])
def test_against_float64(op, dtype, channels):
    packed = packed_of(dtype, channels=channels)
    values = forward_backward(lambda x: op(x, 'triton'), packed)
    exact = forward_backward(lambda x: op(x, 'reference', torch.float64), packed.double())
    for value, truth in zip(values, exact, strict=True):
        assert rms_ratio(value, truth) <= BOUNDS[dtype]


def check_gradients_of_weights(op, x, weights, grad_out):
    def gradients(x, weights, grad_out, impl):
        leaves = [weight.detach().requires_grad_() for weight in weights]
        return torch.autograd.grad(op(x, *leaves, impl=impl), leaves, grad_out)

    values = gradients(x, weights, grad_out, 'triton')
    double = [weight.double() for weight in weights]
    exact = gradients(x.double(), double, grad_out.double(), 'reference')
    for value, truth in zip(values, exact, strict=True):
        assert rms_ratio(value, truth) <= 1e-5
    for _ in range(20):
        assert all(map(torch.equal, values, gradients(x, weights, grad_out, 'triton')))


@pytest.mark.parametrize('side', [3, 5])
def test_gradients_of_weights_against_float64_and_bitwise_equal(side):
    x, grad_out = torch.randn(2, 2, 127, 83, 60, device='cuda')
    mask = torch.rand(2, 127, 83, 1, device='cuda') > 0.3
    weights = torch.randn(60, 1, side, side, device='cuda'), torch.randn(60, device='cuda')

    def op(x, *weights, impl):
        return depthwise_conv2d(x, *weights, add=x, mask=mask, impl=impl)

    check_gradients_of_weights(op, x, weights, grad_out)


def test_gradients_of_a_norm_against_float64_and_bitwise_equal():
    x, grad_out = torch.randn(2, 20_000, 320, device='cuda')
    weights = torch.randn(2, 320, device='cuda').unbind()

    check_gradients_of_weights(layer_norm, x, weights, grad_out)


def test_auto_takes_the_kernel_and_runs_are_bitwise_equal(op):
    packed = packed_of()
    first = forward_backward(lambda x: op(x, 'triton'), packed)
    for _ in range(20):
        assert all(map(torch.equal, first, forward_backward(op, packed)))


def test_cuda_graph(op):
    packed = packed_of().requires_grad_()
    grad_out = torch.ones_like(op(packed))

    def step():
        out = op(packed)
        return out, *torch.autograd.grad(out, packed, grad_out)

    graph, captured = capture(step)
    with torch.no_grad():
        packed.copy_(torch.randn_like(packed))
    graph.replay()
    for value, expected in zip(captured, step(), strict=True):
        assert torch.equal(value, expected)


def test_inductor_without_a_graph_break(op):
    linear = torch.nn.Linear(192, 192, device='cuda', dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: op(linear(x)), fullgraph=True)
    x = packed_of()
    torch.testing.assert_close(compiled(x), op(linear(x)), rtol=2e-2, atol=2e-2)
    compiled(x).sum().backward()
    assert linear.weight.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_norm_under_autocast_has_the_dtype_of_that_of_pytorch(dtype):
    packed = packed_of(torch.float32)
    with torch.autocast('cuda', dtype=dtype):
        assert norm(packed).dtype == norm(packed, 'reference').dtype == torch.float32
        assert norm(packed.to(dtype)).dtype == norm(packed.to(dtype), 'reference').dtype


def feed_forward(x, impl='auto', *, hidden=None, dtype=None, weights=torch.float32):
    """The second half of a block, with a layer scale. Values of weights do not depend on dtypes."""
    channels = x.shape[-1]
    hidden = hidden or 8 * channels
    shapes = [(channels,), (channels,), (hidden, channels), (hidden,), (channels, hidden)]
    shapes += [(channels,), (channels,)]
    values = []
    for shape in shapes:
        size = torch.Size(shape).numel()
        wave = torch.sin(torch.arange(size, device='cuda') * 0.7).view(shape) / shape[-1] ** 0.5
        values.append(wave.to(weights).to(dtype or weights))
    *pairs, gamma = values
    return ffn(x, pairs[:2], pairs[2:4], pairs[4:], gamma=gamma, impl=impl)


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize(('channels', 'hidden'), [(24, 100), (48, 384), (64, 512), (128, 1024)])
def test_a_feed_forward_network_against_float64(dtype, channels, hidden):
    channels = min(channels, 64) if dtype == torch.float32 else channels
    x = packed_of(dtype, channels=channels)
    out = feed_forward(x, 'triton', hidden=hidden, weights=dtype)
    exact = feed_forward(x.double(), 'reference', hidden=hidden, weights=dtype, dtype=torch.float64)
    assert rms_ratio(out, exact) <= BOUNDS[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('stream', [torch.float32, torch.bfloat16])
def test_a_feed_forward_network_under_autocast(dtype, stream):
    x = packed_of(stream, channels=64)
    with torch.autocast('cuda', dtype=dtype):
        out, plain = feed_forward(x), feed_forward(x, 'reference')
    assert out.dtype == plain.dtype == torch.float32
    exact = feed_forward(x.double(), 'reference', dtype=torch.float64)
    assert rms_ratio(out, exact) <= BOUNDS[dtype]


def test_a_feed_forward_network_in_a_graph_and_in_compiled_code():
    x = packed_of(channels=64)

    def step(x=x):
        return feed_forward(x, weights=torch.bfloat16)

    first = step()
    for _ in range(20):
        assert torch.equal(step(), first)
    graph, captured = capture(step)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, step())
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x), rtol=2e-2, atol=2e-2)


def attention(x, impl='auto', *, dtype=None, weights=torch.float32, masked=True):
    """The first half of a block of SAGA. Values of weights do not depend on dtypes."""
    channels = x.shape[-1]

    def values(*shape):
        size = torch.Size(shape).numel()
        wave = torch.sin(torch.arange(size, device='cuda') * 0.7).view(shape) / shape[-1] ** 0.5
        return wave.to(weights).to(dtype or weights)

    shapes = dict(
        norm=(channels,), in_proj=(5 * channels, channels), proj=(channels, channels),
        output_gate=(channels, channels), lepe=(channels, 1, 3, 3),
    )  # fmt: skip
    layers = {name: (values(*shape), values(shape[0])) for name, shape in shapes.items()}
    heads = max(1, channels // 64)
    mask = torch.ones(*x.shape[:3], 1, dtype=torch.bool, device='cuda') if masked else None
    if masked:
        mask[1, 100:] = mask[1, :, 70:] = False
    gamma = values(channels)
    return gated_attention(x, **layers, num_heads=heads, gamma=gamma, mask=mask, impl=impl)


@pytest.mark.parametrize('dtype', BOUNDS)
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('channels', [24, 64, 128])
def test_fused_attention_against_float64(dtype, masked, channels):
    channels = min(channels, 64) if dtype == torch.float32 else channels
    x = packed_of(dtype, channels=channels)
    out = attention(x, 'triton', weights=dtype, masked=masked)
    exact = attention(x.double(), 'reference', weights=dtype, dtype=torch.float64, masked=masked)
    assert rms_ratio(out, exact) <= BOUNDS[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('stream', [torch.float32, torch.bfloat16])
def test_fused_attention_under_autocast(dtype, stream):
    x = packed_of(stream, channels=64)
    with torch.autocast('cuda', dtype=dtype):
        out, plain = attention(x), attention(x, 'reference')
    assert out.dtype == plain.dtype == torch.float32
    exact = attention(x.double(), 'reference', dtype=torch.float64)
    assert rms_ratio(out, exact) <= BOUNDS[dtype]


def test_fused_attention_in_a_graph_and_in_compiled_code():
    x = packed_of(channels=64)

    def step(x=x):
        return attention(x, weights=torch.bfloat16, masked=False)

    first = step()
    for _ in range(20):
        assert torch.equal(step(), first)
    graph, captured = capture(step)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, step())
    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x), rtol=2e-2, atol=2e-2)
