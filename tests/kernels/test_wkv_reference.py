"""Bidirectional WKV against its explicit sums in float64."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from harness import BOUNDS, pairwise, rms_ratio
from saga_kernels import bidirectional_wkv
from saga_kernels.wkv import bounded, export, reference


@pytest.fixture
def general(monkeypatch):
    """No keys are close enough to each other for the short way."""
    monkeypatch.setattr(bounded, 'SPREAD', -1.0)


@pytest.fixture(params=['bounded', 'general'])
def way(request):
    if request.param == 'general':
        request.getfixturevalue('general')


def explicit_sums(k, v, w, u, decay_per='image', mask=None):
    """The formula term by term, of the tokens that are not masked, in float64."""
    out = torch.zeros_like(v, dtype=torch.float64)
    for b, image in enumerate(zip(k.double(), v.double(), strict=True)):
        live = torch.arange(k.shape[1]) if mask is None else mask[b].nonzero().squeeze(1)
        key, value = (x[live] for x in image)
        scale = len(live) if decay_per == 'image' else 1
        place = torch.arange(len(live))
        distance = (place[:, None] - place).abs()[:, :, None]
        exponent = key - (distance - 1) * w.double() / scale
        exponent = torch.where(distance == 0, key + u.double() / scale, exponent)
        weight = (exponent - exponent.amax(1, keepdim=True)).exp()
        out[b, live] = (weight * value).sum(1) / weight.sum(1)
    return out


def inputs(tokens, channels=3, *, batch=2, dtype=torch.float64, w=1.0, scale=1.0):
    k, v = (torch.randn(batch, tokens, channels, dtype=torch.float64) for _ in range(2))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    rate = torch.linspace(0, w, channels, dtype=torch.float64)
    u = torch.randn(channels, dtype=torch.float64)
    x = (scale * k).to(dtype), v.to(dtype), rate.to(parameters), u.to(parameters)
    return [part.requires_grad_() for part in x]


CASES = pairwise(
    tokens=(1, 2, 15, 16, 17, 49, 257, 600),
    w=(0.0, 1e-3, 1.0, 30.0, 1e4),
    scale=(0.1, 1.0, 100.0),
    decay_per=('image', 'token'),
    masked=(False, True),
)


@pytest.mark.parametrize(('tokens', 'w', 'scale', 'decay_per', 'masked'), CASES)
def test_equals_the_explicit_sums_in_float64(way, tokens, w, scale, decay_per, masked):
    x = inputs(tokens, w=w, scale=scale)
    mask = torch.rand(2, tokens) > 0.4 if masked else None
    if masked:
        mask[:, tokens // 2] = True
    truth = explicit_sums(*x, decay_per, mask)
    out = bidirectional_wkv(*x, decay_per=decay_per, mask=mask)
    grad_out = torch.randn_like(truth)
    grads = torch.autograd.grad(out, x, grad_out)
    exact = torch.autograd.grad(truth, x, grad_out)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    for value, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('masked', [False, True])
def test_reference_equals_the_explicit_sums(masked):
    k, v, w, u = inputs(40)
    mask = torch.rand(2, 40) > 0.4 if masked else None
    out = reference.attend(k, v, w[None], u[None], mask)
    truth = explicit_sums(k, v, w, u, 'token', mask)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)


def test_states_pass_every_level(way):
    # More than GROUP^3 tokens: too many for all pairs, so token by token.
    k, v, w, u = inputs(9000, 1, batch=1)
    w = torch.full((1,), 1e-3, dtype=torch.float64)
    weight = torch.stack([(k.exp() * v)[0, :, 0], k.exp()[0, :, 0]], 1).detach()
    decay = (-w).exp()
    before, after = torch.zeros_like(weight), torch.zeros_like(weight)
    for i in range(1, len(weight)):
        before[i] = decay * before[i - 1] + weight[i - 1]
        after[-1 - i] = decay * after[-i] + weight[-i]
    sums = before + after + u.exp() * weight
    out = bidirectional_wkv(k, v, w, u, decay_per='token')
    torch.testing.assert_close(out[0, :, 0], sums[:, 0] / sums[:, 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize('masked', [False, True])
def test_gradients_by_finite_differences_and_twice(way, masked):
    x = inputs(5, 2, batch=1)
    # At a decay of zero, a step would make it negative.
    x[2] = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, False]]) if masked else None

    def op(*x):
        return bidirectional_wkv(*x, mask=mask)

    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x, fast_mode=True)


@pytest.mark.parametrize('decay_per', ['image', 'token'])
def test_padding_changes_nothing(way, decay_per):
    k, v, w, u = inputs(30, batch=1)
    mask = torch.rand(1, 70).argsort(1) < 30
    wide = [torch.full((1, 70, 3), torch.nan, dtype=torch.float64) for _ in range(2)]
    for x, part in zip(wide, (k, v), strict=True):
        x[mask] = part[0].detach()
        x.requires_grad_()
    expected = bidirectional_wkv(k, v, w, u, decay_per=decay_per)
    out = bidirectional_wkv(*wide, w, u, decay_per=decay_per, mask=mask)
    torch.testing.assert_close(out[mask], expected[0], rtol=0, atol=1e-12)
    assert (out[~mask] == 0).all()
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, (*wide, w, u), grad_out)
    exact = torch.autograd.grad(expected, (k, v, w, u), grad_out[mask][None])
    for value, truth in zip(grads[:2], exact[:2], strict=True):
        torch.testing.assert_close(value[mask], truth[0])
        assert (value[~mask] == 0).all()
    torch.testing.assert_close(grads[2:], exact[2:])


def test_all_tokens_masked_gives_zeros(way):
    x = inputs(20)
    out = bidirectional_wkv(*x, mask=torch.zeros(2, 20, dtype=torch.bool))
    assert all((value == 0).all() for value in (out, *torch.autograd.grad(out.sum(), x)))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize('decay_per', ['image', 'token'])
@pytest.mark.parametrize('tokens', [1, 5000])
def test_extreme_exponents_are_finite(dtype, decay_per, tokens):
    k = torch.empty(1, tokens, 6).uniform_(-1e4, 1e4).to(dtype).requires_grad_()
    v = torch.randn(1, tokens, 6).to(dtype).requires_grad_()
    w = torch.tensor([0, 1e-3, 1, 1e2, 1e4, 1e4], requires_grad=True)
    u = torch.tensor([-1e4, 1e4, 0, 1e4, -1e4, 1], requires_grad=True)
    out = bidirectional_wkv(k, v, w, u, decay_per=decay_per)
    grads = torch.autograd.grad(out.float().sum(), (k, v, w, u))
    assert all(x.isfinite().all() for x in (out, *grads))
    # A weighted mean.
    assert (out.abs() <= 1.01 * v.abs().max()).all()


def test_a_million_tokens():
    # Equal keys that do not decay: the mean, which float32 holds for as many tokens as that.
    v = torch.arange(2**20, dtype=torch.float32)[None, :, None] / 2**20
    k, zero = torch.full_like(v, 1e4), torch.zeros(1)
    with torch.no_grad():
        out = bidirectional_wkv(k, v, zero, zero)
        far = bidirectional_wkv(k, v, torch.full((1,), 1e4), zero, decay_per='token')
    torch.testing.assert_close(out, torch.full_like(out, 0.5), rtol=0, atol=1e-4)
    # The two neighbours and the token itself, of equal weight.
    torch.testing.assert_close(far[:, 1:-1], v[:, 1:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize('dtype', BOUNDS)
def test_precision_against_float64(way, dtype):
    x = inputs(1000, 8, batch=1, dtype=dtype, w=50.0)
    out = bidirectional_wkv(*x)
    truth = explicit_sums(*x)
    grad_out = torch.randn(truth.shape).to(dtype)
    grads = torch.autograd.grad(out, x, grad_out)
    exact = torch.autograd.grad(truth, x, grad_out.double())
    assert [value.dtype for value in (out, *grads)] == [dtype] * 3 + [torch.float32] * 2
    # Those of w and u are sums over all tokens, of terms of both signs.
    for value, expected, factor in zip(
        (out, *grads), (truth, *exact), (1, 1, 1, 5, 5), strict=True
    ):
        assert rms_ratio(value, expected) < factor * BOUNDS[dtype]


def test_rounding_does_not_add_up_over_the_tokens(way):
    # A decay that is small beside the exponents: each step of a running maximum is rounded.
    k, v, w, u = inputs(4000, 2, batch=1, dtype=torch.float32)
    k = (k + 1000).detach()
    w = torch.tensor([3.0, 7.0])
    truth = explicit_sums(k, v, w, u)
    assert rms_ratio(bidirectional_wkv(k, v, w, u), truth) < BOUNDS[torch.float32]


class Names(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('change', [None, 'key', 'bonus'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_keys_that_are_close_need_no_running_maximum(change, dtype):
    k, v, w, u = (x.detach() for x in inputs(50, dtype=dtype))
    mask = torch.rand(2, 50) > 0.4
    mask[0, 7] = True
    k[~mask] = torch.nan
    k += 1000
    if change == 'key':
        k[0, 7, 2] -= 100
    elif change == 'bonus':
        u[1] = 30
    with Names() as recorded:
        bidirectional_wkv(k, v, w, u, decay_per='token', mask=mask)
    assert ('maximum' in recorded.names) == (change is not None)


def test_derivatives_at_the_edge_of_what_is_close():
    k, v, w, u = inputs(60, dtype=torch.float32, w=1e4)
    with torch.no_grad():
        k[:, ::5] = bounded.SPREAD
        k[:, 1::5] = 0
        k.clamp_(0, bounded.SPREAD)
        u[:] = torch.tensor([-1, 0, 1]) * bounded.BONUS
    x = k, v, w, u
    exact = [part.detach().double().requires_grad_() for part in x]
    results = []
    for parts, function in (x, bidirectional_wkv), (exact, explicit_sums):
        grads = torch.autograd.grad(function(*parts).sin().sum(), parts, create_graph=True)
        results.append((*grads, *torch.autograd.grad(grads[1].square().sum(), parts)))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_sums_in_float32(dtype):
    x = inputs(50, dtype=torch.float32)
    with torch.autocast('cpu', dtype=dtype):
        out = bidirectional_wkv(*x)
    assert torch.equal(out, bidirectional_wkv(*x))


def test_strided_input_equals_contiguous(way):
    _, _, w, u = inputs(1)
    k, v = torch.randn(2, 2, 3, 40, dtype=torch.float64)[..., ::2].mT
    out = bidirectional_wkv(k, v, w, u)
    assert torch.equal(out, bidirectional_wkv(k.contiguous(), v.contiguous(), w, u))


@pytest.mark.parametrize(('batch', 'tokens'), [(0, 10), (2, 0)])
@pytest.mark.parametrize('masked', [False, True])
def test_empty_input_gives_empty_output_and_zero_gradient(way, batch, tokens, masked):
    x = inputs(tokens, batch=batch)
    mask = torch.ones(batch, tokens, dtype=torch.bool) if masked else None
    out = bidirectional_wkv(*x, mask=mask)
    assert out.shape == (batch, tokens, 3)
    for grad, leaf in zip(torch.autograd.grad(out.sum(), x), x, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize('part', range(2))
def test_nan_stays_visible(way, part):
    x = [value.detach() for value in inputs(40)]
    x[part][0, 3, 2] = torch.nan
    seen = bidirectional_wkv(*x).isnan()
    expected = explicit_sums(*x).isnan()
    assert expected[0, :, 2].all()
    assert torch.equal(seen, expected)


def test_two_runs_are_bitwise_equal(way):
    x = inputs(300, dtype=torch.float32)
    mask = torch.rand(2, 300) > 0.5
    runs = []
    for _ in range(2):
        out = bidirectional_wkv(*x, mask=mask)
        runs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(*values) for values in zip(*runs, strict=True))


def largest_and_peak(tokens):
    """Bytes of the largest temporary, and those that live at a time, per token."""
    k, v = torch.randn(2, 1, tokens, 32)
    w = torch.rand(32)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        bidirectional_wkv(k, v, w, w)
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(sizes) / tokens, max(itertools.accumulate(sizes)) / tokens


def test_memory_grows_with_the_tokens_and_no_temporary_is_larger_than_the_input(way):
    largest, peak = largest_and_peak(2**15)
    # The last group and one more are filled up.
    assert largest <= 1.01 * 32 * 4
    assert peak <= 1.1 * largest_and_peak(2**12)[1]


@pytest.mark.parametrize('masked', [False, True])
def test_blocks_of_channels_change_nothing(masked, chunk_budget, general):
    x = inputs(60, 40, dtype=torch.float32)
    mask = torch.rand(2, 60) > 0.4 if masked else None
    expected = bidirectional_wkv(*x, mask=mask)
    chunk_budget(2**6)
    with torch.no_grad():
        out = bidirectional_wkv(*x, mask=mask)
        vmapped = torch.func.vmap(lambda w: bidirectional_wkv(*x[:2], w, x[3], mask=mask))
        stacked = vmapped(torch.stack([x[2], x[2]]))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(stacked, torch.stack([out, out]))


def test_blocks_of_channels_take_less_memory(chunk_budget, general):
    chunk_budget(2**30)
    _, at_once = largest_and_peak(2**12)
    chunk_budget(2**6)
    assert largest_and_peak(2**12)[1] <= 0.75 * at_once


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(k=[1]), 'k must be a tensor, got list'),
        (dict(k=zeros(4, 3)), r'k must have shape \(B, N, C\), C > 0, got \(4, 3\)'),
        (dict(k=zeros(1, 4, 3, dtype=torch.int32)), 'k must be float16, .* got torch.int32'),
        (dict(v=None), 'v must be a tensor, got NoneType'),
        (dict(v=zeros(1, 5, 3)), r'v must have the shape of k, \(1, 4, 3\), got \(1, 5, 3\)'),
        (dict(v=zeros(1, 4, 3).half()), 'v must have the dtype of k, torch.float32, got'),
        (dict(v=zeros(1, 4, 3, device='meta')), 'v must be on cpu as k is, got meta'),
        (dict(w=0.5), 'w must be a tensor of floats, got float'),
        (dict(w=zeros(3, dtype=torch.int64)), 'w must be .* got torch.int64'),
        (dict(w=zeros(4)), r'w must have shape \(C,\) = \(3,\), got \(4,\)'),
        (dict(w=torch.tensor([0, -0.5, 1])), 'w must not be negative, got -0.5'),
        (dict(u=zeros(1, 3)), r'u must have shape \(C,\) = \(3,\), got \(1, 3\)'),
        (dict(u=zeros(3, device='meta')), 'u must be on cpu, got meta'),
        (dict(decay_per='map'), r"decay_per must be one of \('image', 'token'\), got 'map'"),
        (dict(mask=zeros(1, 4)), 'mask must be a bool tensor, got torch.float32'),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_input_names_the_argument(change, message):
    args = dict(k=zeros(1, 4, 3), v=zeros(1, 4, 3), w=zeros(3), u=zeros(3)) | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        bidirectional_wkv(**args)
    assert '\n' not in str(error.value)


def test_explicit_triton_never_falls_back():
    x = inputs(4, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="bidirectional_wkv: impl='triton' can't run: "):
        bidirectional_wkv(*x, impl='triton')


@pytest.mark.parametrize('masked', [False, True])
def test_transforms_and_other_devices(masked):
    k, v, w, u = (x.detach() for x in inputs(30))
    mask = torch.rand(2, 30) > 0.4 if masked else None

    def op(k, w):
        return bidirectional_wkv(k, v, w, u, mask=mask)

    keys, rates = torch.stack([k, -k]), torch.stack([w, 2 * w])
    expected = torch.stack([op(*x) for x in zip(keys, rates, strict=True)])
    torch.testing.assert_close(torch.func.vmap(op)(keys, rates), expected)
    tangents = torch.randn_like(k), torch.rand_like(w)
    step = [1e-6 * x for x in tangents]
    difference = op(k + step[0], w + 1 + step[1]) - op(k - step[0], w + 1 - step[1])
    _, derivative = torch.func.jvp(op, (k, w + 1), tangents)
    torch.testing.assert_close(derivative, difference / 2e-6, rtol=1e-5, atol=1e-7)
    meta = [None if x is None else x.to('meta') for x in (k, v, w, u, mask)]
    assert bidirectional_wkv(*meta[:4], mask=meta[4]).shape == k.shape


class Tokens(torch.nn.Module):
    """The mean over tokens (B, N, 2 * C)."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.0, 5.0, 50.0]))
        self.u = torch.nn.Parameter(torch.tensor([0.0, 1.0, -1.0]))

    def forward(self, x, mask=None):
        return bidirectional_wkv(*x.chunk(2, 2), self.w, self.u, mask=mask)


def test_compiles_without_a_graph_break():
    module, x = Tokens(), torch.randn(1, 90, 6)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize('decay_per', ['image', 'token'])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('tokens', [1, 5, 16, 17, 300])
@pytest.mark.parametrize(('keys', 'decay'), [(1, 0.1), (1, 0.0), (5, 20.0), (1e4, 1e4)])
def test_what_is_recorded_is_the_specification(tokens, masked, keys, decay, decay_per):
    k, v = torch.randn(2, 2, tokens, 6, dtype=torch.float64)
    w, u = decay * torch.rand(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    k = keys * k.tanh()
    mask = torch.rand(2, tokens) > 0.3 if masked else None
    if masked:
        mask[0] = False
        v[~mask] = torch.nan
    out = export.attend(k, v, w, u, decay_per, mask)
    exact = bidirectional_wkv(k, v, w, u, decay_per=decay_per, mask=mask, impl='reference')
    torch.testing.assert_close(out, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('masked', [False, True])
def test_exports_with_a_dynamic_number_of_tokens(masked):
    module = Tokens()

    def example(tokens):
        return torch.randn(1, tokens, 6), torch.rand(1, tokens) > 0.4 if masked else None

    axis = {1: torch.export.Dim.DYNAMIC}
    dynamic = {'x': axis, 'mask': axis if masked else None}
    program = torch.export.export(module, example(90), dynamic_shapes=dynamic)
    assert not any('saga_kernels' in str(node.target) for node in program.graph.nodes)
    # Fewer tokens than a group, and more than a group of groups of groups.
    for tokens in (3, 4500):
        x = example(tokens)
        torch.testing.assert_close(program.module()(*x), module(*x))
