"""The reference agrees with its explicit N x N decay matrix, in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import decay_linear_attention, linear_attention


def positions(size, heads):
    """Position of every token in the scan of every head: (H, N)."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    by_row, by_column = (y * width + x).flatten(), (x * height + y).flatten()
    return torch.stack([by_row if 2 * h < heads else by_column for h in range(heads)])


def quadratic_attention(qkv, log_decay, size, feature_map='elu', eps=1e-6, mask=None):
    """Attention with explicit weights (B, H, N, N) that decay with the distance in the scan."""
    q, k, v = (part.permute(0, 2, 1, 3) for part in qkv.double().unbind(2))
    phi = F.relu if feature_map == 'relu' else lambda x: F.elu(x) + 1
    p = positions(size, qkv.shape[3])
    gamma = log_decay.double().exp()[:, None, None]
    weights = torch.einsum('bhid,bhjd->bhij', phi(q), phi(k))
    weights = weights * gamma ** (p[:, :, None] - p[:, None, :]).abs()
    if mask is not None:
        weights = weights * mask[:, None, None, :] * mask[:, None, :, None]
    out = weights @ v / (weights.sum(-1, keepdim=True) + eps)
    return out.permute(0, 2, 1, 3)


def inputs(size, heads=2, dim=8, batch=1, dtype=torch.float64, gammas=(0.5, 0.9, 0.99)):
    tokens = size[0] * size[1]
    qkv = torch.randn(batch, tokens, 3, heads, dim, dtype=torch.float64).to(dtype)
    log_decay = torch.tensor(gammas, dtype=torch.float64).log().repeat(heads)[:heads]
    log_decay = log_decay.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return qkv.requires_grad_(), log_decay.requires_grad_()


CASES = pairwise(
    size=((1, 1), (7, 9), (8, 8), (65, 1), (40, 50)),
    gamma=(1e-6, 0.3, 0.99, 1.0),
    heads=(1, 2, 3),
    feature_map=('elu', 'relu'),
    masked=(False, True),
)


@pytest.mark.parametrize(('size', 'gamma', 'heads', 'feature_map', 'masked'), CASES)
def test_equals_the_decay_matrix_in_float64(size, gamma, heads, feature_map, masked):
    qkv, log_decay = inputs(size, heads, gammas=(gamma, min(1, 1.2 * gamma)))
    mask = torch.rand(1, qkv.shape[1]) > 0.3 if masked else None
    options = dict(feature_map=feature_map, mask=mask)
    out = decay_linear_attention(qkv, log_decay, size, **options)
    truth = quadratic_attention(qkv, log_decay, size, **options)
    grad_out = torch.randn_like(truth)
    grads = torch.autograd.grad(out, (qkv, log_decay), grad_out)
    exact = torch.autograd.grad(truth, (qkv, log_decay), grad_out)
    assert out.shape == truth.shape
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    # A row that is zero after ReLU has a gradient of 1 / eps, so the bound is on the ratio.
    for value, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-10)


def test_states_pass_groups_of_chunks():
    # Four groups of 8 chunks of 64 tokens: too many for the matrix, so token by token.
    size, dim = (4, 500), 2
    qkv, log_decay = inputs(size, heads=1, dim=dim, gammas=(0.9999,))
    q, k, v = qkv.detach()[0, :, :, 0].unbind(1)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    outer = k[:, :, None] * F.pad(v, (0, 1), value=1.0)[:, None, :]
    gamma = log_decay.exp().item()
    forward, backward = torch.zeros_like(outer), torch.zeros_like(outer)
    for i in range(1, len(outer)):
        forward[i] = gamma * (forward[i - 1] + outer[i - 1])
        backward[-1 - i] = gamma * (backward[-i] + outer[-i])
    sums = torch.einsum('nd,nde->ne', q, forward + outer + backward)
    truth = sums[:, :dim] / (sums[:, dim:] + 1e-6)
    out = decay_linear_attention(qkv, log_decay, size)
    torch.testing.assert_close(out[0, :, 0], truth, rtol=0, atol=1e-10)


def test_gradients_by_finite_differences_and_twice():
    qkv, log_decay = inputs((2, 3), heads=2, dim=2)

    def op(qkv, log_decay):
        return decay_linear_attention(qkv, log_decay, (2, 3))

    assert torch.autograd.gradcheck(op, (qkv, log_decay))
    assert torch.autograd.gradgradcheck(op, (qkv, log_decay), fast_mode=True)


@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_without_decay_it_is_linear_attention(feature_map):
    qkv, _ = inputs((20, 30), heads=3)
    out = decay_linear_attention(qkv, torch.zeros(3).double(), (20, 30), feature_map=feature_map)
    expected = linear_attention(qkv, feature_map=feature_map)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


def test_the_second_half_of_the_heads_scans_columns():
    # For a transposed map with swapped heads, the result is transposed and swapped as well.
    height, width = 6, 11
    qkv, log_decay = inputs((height, width), heads=2)
    other = qkv.unflatten(1, (height, width)).transpose(1, 2).flatten(1, 2).flip(3)
    out = decay_linear_attention(qkv, log_decay, (height, width))
    swapped = decay_linear_attention(other, log_decay.flip(0), (width, height))
    swapped = swapped.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2).flip(2)
    torch.testing.assert_close(out, swapped, rtol=0, atol=1e-12)


def test_a_large_image_is_finite():
    qkv, log_decay = inputs((640, 640), dim=4, dtype=torch.float32, gammas=(1e-30, 1.0))
    out = decay_linear_attention(qkv, log_decay, (640, 640))
    grads = torch.autograd.grad(out.sum(), (qkv, log_decay))
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize('dtype', BOUNDS)
def test_precision_against_float64(dtype):
    size = (25, 40)
    qkv, log_decay = inputs(size, heads=3, dim=32, dtype=dtype)
    out = decay_linear_attention(qkv, log_decay, size)
    truth = quadratic_attention(qkv, log_decay, size)
    grad_out = torch.randn(truth.shape).to(dtype)
    grads = torch.autograd.grad(out, (qkv, log_decay), grad_out)
    exact = torch.autograd.grad(truth, (qkv, log_decay), grad_out.double())
    assert (out.dtype, grads[0].dtype, grads[1].dtype) == (dtype, dtype, torch.float32)
    for value, expected in zip((out, *grads), (truth, *exact), strict=True):
        assert rms_ratio(value, expected) < BOUNDS[dtype]


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_sums_in_float32(dtype):
    qkv, log_decay = inputs((20, 25), dtype=torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        out = decay_linear_attention(qkv, log_decay, (20, 25))
    assert torch.equal(out, decay_linear_attention(qkv, log_decay, (20, 25)))


def test_strided_input_equals_contiguous():
    qkv = torch.randn(2, 40, 7, 2, 24, dtype=torch.float64)[:, ::2, 1:4]
    log_decay = torch.tensor([-0.1, -1.0])
    out = decay_linear_attention(qkv, log_decay, (4, 5))
    assert torch.equal(out, decay_linear_attention(qkv.contiguous(), log_decay, (4, 5)))


@pytest.mark.parametrize(('batch', 'size'), [(0, (2, 5)), (2, (0, 5)), (2, (5, 0))])
def test_empty_input_gives_empty_output_and_zero_gradient(batch, size):
    qkv, log_decay = inputs(size, batch=batch)
    out = decay_linear_attention(qkv, log_decay, size)
    assert out.shape == (batch, size[0] * size[1], 2, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(log_decay.grad, torch.zeros(2).double())


@pytest.mark.parametrize('part', range(3))
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_nan_stays_visible(part, feature_map):
    qkv, log_decay = inputs((20, 10), gammas=(1e-6,))
    qkv = qkv.detach()
    qkv[0, 3, part, 0, 2] = float('nan')
    seen = decay_linear_attention(qkv, log_decay, (20, 10), feature_map=feature_map).isnan()
    expected = quadratic_attention(qkv, log_decay, (20, 10), feature_map).isnan()
    assert expected[0, 3].any()
    assert torch.equal(seen, expected)


def test_masked_tokens_add_nothing_and_keep_their_place():
    size = (10, 12)
    qkv, log_decay = inputs(size)
    mask = torch.rand(1, 120) > 0.5
    truth = quadratic_attention(qkv, log_decay, size, mask=mask)
    qkv = torch.where(mask[:, :, None, None, None], qkv, float('nan'))
    out = decay_linear_attention(qkv, log_decay, size, mask=mask)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    assert (out[~mask] == 0).all()


def peak_memory(tokens):
    """Peak bytes besides the input, per token."""
    qkv, log_decay = torch.randn(1, tokens, 3, 2, 16), torch.full((2,), -0.01)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        decay_linear_attention(qkv, log_decay, (64, tokens // 64))
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / tokens


def test_memory_grows_with_the_tokens():
    assert peak_memory(2**15) <= 1.1 * peak_memory(2**12)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(qkv=[1]),
            'qkv must be 3 tensors .* got int',
        ),
        (dict(qkv=zeros(1, 4, 5, 2, 8)), 'qkv must have shape'),
        (dict(qkv=zeros(1, 4, 3, 2, 8, dtype=torch.int32)), 'qkv must be float16'),
        (dict(size=4), r'size must be \(height, width\), got 4'),
        (dict(size=(2, 2, 1)), r'size must be \(height, width\), got \(2, 2, 1\)'),
        (dict(size=(2.0, 2)), r'size must be .* got \(2.0, 2\)'),
        (dict(size=(2, 3)), 'size must hold N = 4 tokens, got 2 x 3'),
        (dict(size=(-2, -2)), 'size must .*, got .*-2'),
        (dict(log_decay=-0.5), 'log_decay must be a tensor of floats, got float'),
        (dict(log_decay=zeros(2, dtype=torch.int64)), 'log_decay must be .* got torch.int64'),
        (dict(log_decay=zeros(3)), r'log_decay must have shape \(H,\) = \(2,\), got \(3,\)'),
        (dict(log_decay=zeros(2, device='meta')), 'log_decay must be on cpu, got meta'),
        (dict(feature_map='gelu'), "feature_map must be one of .* got 'gelu'"),
        (dict(eps=0.0), 'eps must be a positive number, got 0.0'),
        (dict(mask=zeros(1, 4)), 'mask must be a bool tensor, got torch.float32'),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_input_names_the_argument(change, message):
    args = dict(qkv=zeros(1, 4, 3, 2, 8), log_decay=zeros(2), size=(2, 2)) | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        decay_linear_attention(**args)
    assert '\n' not in str(error.value)


def test_explicit_triton_never_falls_back_on_a_cpu():
    qkv, log_decay = inputs((2, 2), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="decay_linear_attention: impl='triton' can't run: "):
        decay_linear_attention(qkv, log_decay, (2, 2), impl='triton')


class Map(torch.nn.Module):
    """Attention over a map (B, height, width, 3 * H * D)."""

    def __init__(self):
        super().__init__()
        self.log_decay = torch.nn.Parameter(torch.tensor([-0.1, -0.5, -1.0]))

    def forward(self, x):
        size = x.shape[1:3]
        qkv = x.flatten(1, 2).unflatten(-1, (3, 3, 8))
        return decay_linear_attention(qkv, self.log_decay, size).unflatten(1, size)


def test_compiles_without_a_graph_break():
    module, x = Map(), torch.randn(1, 9, 10, 72)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))


def test_exports_with_dynamic_height_and_width():
    module = Map()
    dynamic = {'x': {axis: torch.export.Dim.DYNAMIC for axis in (1, 2)}}
    program = torch.export.export(module, (torch.randn(1, 9, 10, 72),), dynamic_shapes=dynamic)
    assert not any('saga_kernels' in str(node.target) for node in program.graph.nodes)
    # Fewer tokens than a chunk, and more than a group of chunks.
    for size in ((3, 5), (50, 90)):
        x = torch.randn(1, *size, 72)
        torch.testing.assert_close(program.module()(x), module(x))
