"""The reference agrees with the plain formula of the paper's code, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from harness import BOUNDS, peak_memory, rms_ratio
from saga_kernels import dispatch
from saga_kernels import rank_augmented_linear_attention as attention

SHAPES = [(1, (1, 1), 1, 8), (2, (7, 7), 3, 20), (1, (9, 7), 2, 24), (2, (1, 50), 1, 64)]


def frequencies_of(dim, dtype=torch.float32):
    return 10000 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64).to(dtype)


def packed_of(tokens, dim=8, *, batch=1, heads=1, dtype=torch.float32):
    return torch.randn(batch, tokens, 3, heads, dim, dtype=dtype)


def rotated(x, size, frequencies):
    """Rotate pairs of channels of (B, H, N, D) as complex numbers, token by token."""
    turns = [
        torch.cat((row * frequencies, column * frequencies))
        for row in range(size[0])
        for column in range(size[1])
    ]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(turns[0]), torch.stack(turns))
    return torch.view_as_real(turned).flatten(-2)


def quadratic_attention(qkv, size, frequencies, eps=1e-6, mask=None):
    """Attention with explicit weights, image by image, over the tokens that are not masked."""
    out = torch.zeros(qkv[:, :, 0].shape, dtype=torch.float64)
    for image in range(qkv.shape[0]):
        live = torch.ones(qkv.shape[1]).bool() if mask is None else mask[image]
        q, k, v = (part.transpose(0, 1) for part in qkv[image].double().unbind(1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        turned_q, turned_k = (rotated(x, size, frequencies.double())[:, live] for x in (q, k))
        q, k, v = q[:, live], k[:, live], v[:, live]
        tokens, dim = v.shape[1:]
        scores = (k * q.mean(1, keepdim=True)).sum(-1) / math.sqrt(dim)
        share = tokens * scores.softmax(-1)
        weights = turned_q @ turned_k.transpose(1, 2) * share[:, None] / tokens
        denominator = q @ (share[..., None] * k).mean(1).unsqueeze(-1) + eps
        out[image, live] = (weights @ v / denominator).transpose(0, 1)
    return out


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('masked', [False, True])
def test_equals_the_formula_in_float64(shape, masked):
    batch, size, heads, dim = shape
    tokens = math.prod(size)
    qkv = packed_of(tokens, dim, batch=batch, heads=heads, dtype=torch.float64).requires_grad_()
    frequencies = frequencies_of(dim, torch.float64)
    mask = torch.rand(batch, tokens) > 0.3 if masked else None
    if masked:
        mask[:, 0] = True
    out = attention(qkv, size, frequencies, mask=mask)
    truth = quadratic_attention(qkv, size, frequencies, mask=mask)
    grad_out = torch.randn_like(truth)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    (grad_truth,) = torch.autograd.grad(truth, qkv, grad_out)
    assert out.shape == (batch, tokens, heads, dim)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, grad_truth, rtol=0, atol=1e-10)


def test_rows_turn_the_first_half_and_columns_the_second():
    qkv = packed_of(6, 16, dtype=torch.float64)
    frequencies = frequencies_of(16, torch.float64)

    def transposed(x, size):
        # Rows become columns, and the halves of each head are swapped.
        return x.unflatten(1, size).transpose(1, 2).flatten(1, 2).roll(8, -1)

    out = attention(qkv, (2, 3), frequencies)
    assert not torch.allclose(out, attention(qkv, (3, 2), frequencies))
    turned = attention(transposed(qkv, (2, 3)), (3, 2), frequencies)
    torch.testing.assert_close(out, transposed(turned, (3, 2)))


def test_tokens_that_the_global_query_prefers_weigh_more():
    qkv = torch.zeros(1, 2, 3, 1, 8, dtype=torch.float64)
    qkv[0, 1, 1] = 1.0
    qkv[0, :, 2] = torch.tensor([0.0, 1.0])[:, None, None]
    out = attention(qkv, (1, 2), torch.zeros(2, dtype=torch.float64))
    # phi(q) = 1, phi(k) = 1 and 2: scores 8 / sqrt(8) and twice that.
    share = math.exp(math.sqrt(8))
    expected = torch.full_like(out, 2 * share / (1 + 2 * share))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('dtype', BOUNDS)
def test_precision_against_float64(dtype):
    qkv = packed_of(1000, 32, batch=2, heads=2).to(dtype).requires_grad_()
    frequencies = frequencies_of(32)
    out = attention(qkv, (25, 40), frequencies)
    exact = qkv.detach().double().requires_grad_()
    truth = quadratic_attention(exact, (25, 40), frequencies)
    grad_out = torch.randn(truth.shape).to(dtype)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    (grad_truth,) = torch.autograd.grad(truth, exact, grad_out.double())
    assert out.dtype == grad.dtype == dtype
    assert rms_ratio(out, truth.detach()) < BOUNDS[dtype]
    assert rms_ratio(grad, grad_truth) < BOUNDS[dtype]


@pytest.mark.parametrize('dtype', BOUNDS)
def test_small_features_are_not_cancelled(dtype):
    # ELU(x) + 1 is 0 below -8 in float16 and below -17 in float32.
    qkv = packed_of(20, 8).to(dtype)
    qkv[:, :, :2] -= 18
    out = attention(qkv, (4, 5), frequencies_of(8), eps=1e-20)
    truth = attention(qkv.double(), (4, 5), frequencies_of(8), eps=1e-20)
    assert rms_ratio(out, truth) < BOUNDS[dtype]


def test_half_precision_beyond_65504_tokens_is_finite():
    qkv = torch.full((1, 70_000, 3, 1, 8), 30.0, dtype=torch.float16)
    out = attention(qkv, (7, 10_000), torch.zeros(2))
    torch.testing.assert_close(out, qkv[:, :, 2])
    turned = attention(qkv, (7, 10_000), frequencies_of(8))
    assert turned.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_sums_in_float32(dtype):
    qkv = packed_of(500, 32, heads=2)
    with torch.autocast('cpu', dtype=dtype):
        out = attention(qkv, (20, 25), frequencies_of(32))
    assert torch.equal(out, attention(qkv, (20, 25), frequencies_of(32)))


def test_angles_are_float32_or_better():
    # bfloat16 can represent neither position 3999 nor its angle.
    qkv = packed_of(4000, 8, dtype=torch.bfloat16)
    out = attention(qkv, (1, 4000), frequencies_of(8))
    truth = attention(qkv.double(), (1, 4000), frequencies_of(8))
    assert rms_ratio(out, truth) < BOUNDS[torch.bfloat16]


def test_strided_input_equals_contiguous():
    qkv = torch.randn(2, 40, 5, 2, 24, dtype=torch.float64)[:, ::2, 1:4]
    assert not qkv.is_contiguous()
    frequencies = frequencies_of(24)
    out = attention(qkv, (4, 5), frequencies)
    assert torch.equal(out, attention(qkv.contiguous(), (4, 5), frequencies))


@pytest.mark.parametrize(('batch', 'size'), [(0, (2, 5)), (2, (0, 5)), (2, (5, 0))])
@pytest.mark.parametrize('masked', [False, True])
def test_empty_input_gives_empty_output_and_gradient(batch, size, masked):
    tokens = math.prod(size)
    qkv = packed_of(tokens, batch=batch, heads=2).requires_grad_()
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    out = attention(qkv, size, frequencies_of(8), mask=mask)
    assert out.shape == (batch, tokens, 2, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize('part', range(3))
def test_nan_stays_visible(part):
    qkv = packed_of(10)
    qkv[0, 3, part, 0, 2] = float('nan')
    assert attention(qkv, (2, 5), frequencies_of(8))[0, 3].isnan().any()


def test_masked_tokens_change_nothing_even_when_nan():
    qkv = packed_of(30, batch=2, heads=2)
    frequencies = frequencies_of(8)
    mask = torch.arange(30) < 20
    alone = attention(qkv[:, :20], (4, 5), frequencies)
    qkv[:, 20:] = float('nan')
    out = attention(qkv, (6, 5), frequencies, mask=mask.expand(2, 30))
    torch.testing.assert_close(out[:, :20], alone)
    assert (out[:, 20:] == 0).all()


def test_all_tokens_masked_gives_zeros():
    qkv = packed_of(20).requires_grad_()
    mask = torch.zeros(1, 20, dtype=torch.bool)
    out = attention(qkv, (4, 5), frequencies_of(8), mask=mask)
    out.sum().backward()
    assert (out == 0).all()
    assert (qkv.grad == 0).all()


def test_few_token_tensors_besides_input_and_output():
    setup = """
from saga_kernels import rank_augmented_linear_attention
qkv, frequencies = torch.randn(2, 25600, 3, 4, 32), torch.rand(8)
"""
    # The output, the rotation's table, which images and heads share, and chunks.
    call = 'rank_augmented_linear_attention(qkv, (100, 256), frequencies)'
    assert peak_memory(setup, call) <= 1.7


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(qkv=[1]),
            'qkv must be 3 tensors .* got int',
        ),
        (dict(qkv=torch.zeros(1, 4, 5, 1, 8)), 'qkv must have shape'),
        (dict(qkv=torch.zeros(1, 4, 3, 8)), 'qkv must have shape'),
        (dict(qkv=torch.zeros(1, 4, 3, 1, 10)), 'divisible by 4 to be rotated, got 10'),
        (dict(qkv=torch.zeros(1, 4, 3, 1, 8, dtype=torch.int32)), 'qkv must be float16'),
        (dict(size=(2, 3)), 'size must hold N = 4 tokens, got 2 x 3'),
        (dict(size=(-2, -2)), 'size must hold N = 4 tokens, got -2 x -2'),
        (dict(size=4), r'size must be \(height, width\), got 4'),
        (dict(size=(2, 2, 1)), r'size must be \(height, width\), got \(2, 2, 1\)'),
        (dict(size=(2.0, 2.0)), r'size must be two integers, got \(2.0, 2.0\)'),
        (dict(frequencies=None), 'frequencies must be a floating-point tensor, got NoneType'),
        (dict(frequencies=torch.ones(2).long()), 'frequencies must be a .* got torch.int64'),
        (dict(frequencies=torch.ones(4)), r'frequencies must have shape .* \(2,\), got \(4,\)'),
        (dict(frequencies=torch.ones(2, device='meta')), 'frequencies must be on cpu, got meta'),
        (dict(frequencies=torch.ones(2, requires_grad=True)), 'frequencies get no gradient'),
        (dict(eps=0.0), 'eps must be a positive number, got 0.0'),
        (dict(mask=torch.ones(1, 4)), 'mask must be a bool tensor, got torch.float32'),
        (dict(mask=torch.ones(1, 5, dtype=torch.bool)), r'mask must have shape .*\(1, 4\)'),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_input_names_the_argument(change, message):
    args = dict(qkv=torch.zeros(1, 4, 3, 1, 8), size=(2, 2), frequencies=torch.ones(2)) | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        attention(**args)
    assert '\n' not in str(error.value)


def test_explicit_triton_never_falls_back_on_a_cpu(monkeypatch):
    qkv, frequencies = packed_of(4), frequencies_of(8)
    message = "rank_augmented_linear_attention: impl='triton' can't run: "
    with pytest.raises(RuntimeError, match=message):
        attention(qkv, (2, 2), frequencies, impl='triton')
    monkeypatch.setenv(dispatch.ENV_VAR, 'triton')
    with pytest.raises(RuntimeError, match=message):
        attention(qkv, (2, 2), frequencies)
    assert attention(qkv, (2, 2), frequencies, impl='reference').shape == (1, 4, 1, 8)


class Mixer(torch.nn.Module):
    """Attention over a map (B, 3 * C, height, width), as a backbone calls it."""

    def __init__(self):
        super().__init__()
        self.register_buffer('frequencies', frequencies_of(8))

    def forward(self, x):
        qkv = x.flatten(2).transpose(1, 2).unflatten(-1, (3, 2, 8))
        return attention(qkv, x.shape[2:], self.frequencies)


def test_compiles_without_a_graph_break_and_never_again_for_a_new_size():
    mixer = Mixer()
    compiled = torch.compile(mixer, fullgraph=True, backend='aot_eager', dynamic=True)
    torch.testing.assert_close(compiled(x := torch.randn(1, 48, 4, 5)), mixer(x))
    with torch.compiler.set_stance('fail_on_recompile'):
        torch.testing.assert_close(compiled(x := torch.randn(1, 48, 7, 3)), mixer(x))


def test_exports_with_dynamic_height_and_width():
    mixer = Mixer()
    dynamic = {'x': {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(mixer, (torch.randn(1, 48, 4, 5),), dynamic_shapes=dynamic)
    for size in ((7, 3), (12, 10)):
        x = torch.randn(1, 48, *size)
        torch.testing.assert_close(program.module()(x), mixer(x))
