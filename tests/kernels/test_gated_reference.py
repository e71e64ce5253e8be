"""The reference agrees with the O(N^2) formula and with explicit gate matrices, in float64."""

import pytest
import torch
import torch.nn.functional as F

from harness import peak_memory, rms_ratio
from saga_kernels import dispatch, gated_linear_attention, linear_attention

SHAPES = [(1, 1, 1, 8), (2, 49, 3, 17), (1, 63, 2, 24), (3, 200, 1, 64)]


def phi(x, feature_map):
    return F.elu(x) + 1 if feature_map == 'elu' else F.relu(x)


def quadratic_attention(packed, feature_map, eps, mask=None):
    """Attention with explicit weights (B, H, N, N); row gates on keys, column gates on values."""
    parts = [part.permute(0, 2, 1, 3) for part in packed.double().unbind(2)]
    q, k, v = phi(parts[0], feature_map), phi(parts[1], feature_map), parts[2]
    if len(parts) == 5:
        k, v = k * parts[3].sigmoid(), v * parts[4].sigmoid()
    weights = torch.einsum('bhid,bhjd->bhij', q, k)
    if mask is not None:
        weights = weights * mask[:, None, None, :]
    out = torch.einsum('bhij,bhjd->bhid', weights, v) / (weights.sum(-1, keepdim=True) + eps)
    if mask is not None:
        out = out * mask[:, None, :, None]
    return out.permute(0, 2, 1, 3)


def explicit_gate_attention(packed, feature_map, eps):
    """Every gate matrix G_i (D x D) is built, and multiplies the outer product of key and value."""
    q, k, v, a, b = packed.double().unbind(2)
    gates = torch.einsum('bnhd,bnhe->bnhde', a.sigmoid(), b.sigmoid())
    outer = torch.einsum('bnhd,bnhe->bnhde', phi(k, feature_map), v)
    state = (gates * outer).sum(1)
    normalizer = (a.sigmoid() * phi(k, feature_map)).sum(1)
    q = phi(q, feature_map)
    numerator = torch.einsum('bnhd,bhde->bnhe', q, state)
    return numerator / (torch.einsum('bnhd,bhd->bnh', q, normalizer)[..., None] + eps)


def op_of(parts):
    return gated_linear_attention if parts == 5 else linear_attention


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
@pytest.mark.parametrize('parts', [3, 5])
@pytest.mark.parametrize('masked', [False, True])
def test_equals_quadratic_formula_in_float64(shape, feature_map, parts, masked):
    batch, tokens, heads, dim = shape
    packed = torch.randn(batch, tokens, parts, heads, dim, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(batch, tokens) > 0.3 if masked else None
    out = op_of(parts)(packed, feature_map=feature_map, mask=mask)
    truth = quadratic_attention(packed, feature_map, 1e-6, mask)
    grad_out = torch.randn_like(truth)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    (grad_truth,) = torch.autograd.grad(truth, packed, grad_out)
    assert out.shape == (batch, tokens, heads, dim)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    # A row that is zero after ReLU has a gradient of 1 / eps, so the bound is on the ratio.
    torch.testing.assert_close(grad, grad_truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_factorised_gate_equals_explicit_gate_matrices(feature_map):
    packed = torch.randn(2, 30, 5, 2, 12, dtype=torch.float64)
    out = gated_linear_attention(packed, feature_map=feature_map)
    truth = explicit_gate_attention(packed, feature_map, 1e-6)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)


def test_gates_matter_and_open_gates_do_not():
    packed = torch.randn(1, 20, 5, 1, 8, dtype=torch.float64)
    plain = linear_attention(packed[:, :, :3])
    assert not torch.allclose(gated_linear_attention(packed), plain, atol=1e-3)
    packed[:, :, 3:] = 50.0
    torch.testing.assert_close(gated_linear_attention(packed), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ('dtype', 'bound'), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)]
)
def test_precision_against_float64(dtype, bound):
    packed = torch.randn(2, 1000, 5, 2, 32).to(dtype).requires_grad_()
    out = gated_linear_attention(packed)
    exact = packed.detach().double().requires_grad_()
    truth = quadratic_attention(exact, 'elu', 1e-6)
    grad_out = torch.randn(truth.shape).to(dtype)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    (grad_truth,) = torch.autograd.grad(truth, exact, grad_out.double())
    assert out.dtype == grad.dtype == dtype
    assert rms_ratio(out, truth.detach()) < bound
    assert rms_ratio(grad, grad_truth) < bound


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_sums_in_float32(dtype):
    packed = torch.randn(1, 500, 5, 2, 32)
    with torch.autocast('cpu', dtype=dtype):
        out = gated_linear_attention(packed)
    assert torch.equal(out, gated_linear_attention(packed))


def test_float16_sums_do_not_overflow():
    packed = torch.full((1, 5000, 3, 1, 16), 30.0, dtype=torch.float16)
    torch.testing.assert_close(linear_attention(packed), packed[:, :, 2])


def test_strided_input_equals_contiguous():
    packed = torch.randn(2, 40, 7, 2, 24, dtype=torch.float64)[:, ::2, 1:6]
    assert not packed.is_contiguous()
    assert torch.equal(gated_linear_attention(packed), gated_linear_attention(packed.contiguous()))


@pytest.mark.parametrize('shape', [(0, 10, 5, 2, 8), (2, 0, 5, 2, 8)])
def test_empty_input_gives_empty_output_and_gradient(shape):
    packed = torch.randn(shape, requires_grad=True)
    out = gated_linear_attention(packed)
    assert out.shape == (shape[0], shape[1], 2, 8)
    out.sum().backward()
    assert packed.grad.shape == shape


@pytest.mark.parametrize('part', range(5))
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
def test_nan_stays_visible(part, feature_map):
    packed = torch.randn(1, 10, 5, 1, 8)
    packed[0, 3, part, 0, 2] = float('nan')
    assert gated_linear_attention(packed, feature_map=feature_map)[0, 3].isnan().any()


def test_masked_tokens_change_nothing_even_when_nan():
    packed = torch.randn(2, 30, 5, 2, 8)
    mask = torch.arange(30) < 20
    alone = gated_linear_attention(packed[:, :20])
    packed[:, 20:] = float('nan')
    out = gated_linear_attention(packed, mask=mask.expand(2, 30))
    torch.testing.assert_close(out[:, :20], alone)
    assert (out[:, 20:] == 0).all()


@pytest.mark.parametrize('shape', [(1, 102400, 5, 1, 64), (2, 51200, 5, 2, 32)])
def test_no_token_tensors_besides_input_and_output(shape):
    setup = f'from saga_kernels import gated_linear_attention\npacked = torch.randn{shape}'
    # The profiler's total includes the output; the chunks may take half of its size.
    assert peak_memory(setup, 'gated_linear_attention(packed)') <= 1.5


def test_gradients_of_gradients():
    packed = torch.randn(1, 5, 5, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gated_linear_attention, packed)
    assert torch.autograd.gradgradcheck(gated_linear_attention, packed)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            dict(qkvab=[1]),
            'qkvab must be 5 tensors .* got int',
        ),
        (dict(qkvab=torch.zeros(1, 4, 3, 1, 8)), 'qkvab must have shape'),
        (dict(qkvab=torch.zeros(1, 4, 5, 8)), 'qkvab must have shape'),
        (dict(qkvab=torch.zeros(1, 4, 5, 0, 8)), 'at least one head'),
        (dict(qkvab=torch.zeros(1, 4, 5, 1, 8, dtype=torch.int32)), 'qkvab must be float16'),
        (dict(feature_map='gelu'), "feature_map must be one of .* got 'gelu'"),
        (dict(eps=0.0), 'eps must be a positive number, got 0.0'),
        (dict(eps=float('nan')), 'eps must be a positive number, got nan'),
        (dict(mask=torch.ones(1, 4)), 'mask must be a bool tensor, got torch.float32'),
        (dict(mask=torch.ones(1, 5, dtype=torch.bool)), r'mask must have shape .*\(1, 4\)'),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
    ],
)
def test_wrong_input_names_the_argument(change, message):
    args = dict(qkvab=torch.zeros(1, 4, 5, 1, 8)) | change
    with pytest.raises((ValueError, TypeError), match=message) as error:
        gated_linear_attention(**args)
    assert '\n' not in str(error.value)


def test_explicit_triton_never_falls_back_on_a_cpu(monkeypatch):
    packed = torch.zeros(1, 4, 5, 1, 8)
    with pytest.raises(RuntimeError, match="gated_linear_attention: impl='triton' can't run: "):
        gated_linear_attention(packed, impl='triton')
    monkeypatch.setenv(dispatch.ENV_VAR, 'triton')
    with pytest.raises(RuntimeError, match="impl='triton' can't run"):
        gated_linear_attention(packed)
    # An explicit argument takes precedence over the environment.
    assert gated_linear_attention(packed, impl='reference').shape == (1, 4, 1, 8)
    monkeypatch.setenv(dispatch.ENV_VAR, 'fast')
    with pytest.raises(ValueError, match=r"SAGA_KERNELS_IMPL must be one of .* got 'fast'"):
        gated_linear_attention(packed)


def test_auto_says_its_choice_once(monkeypatch, caplog):
    monkeypatch.delenv(dispatch.ENV_VAR, raising=False)
    monkeypatch.setattr(dispatch, '_logged', set())
    caplog.set_level('INFO', logger='saga_kernels')
    packed = torch.zeros(1, 4, 5, 1, 8)
    gated_linear_attention(packed)
    gated_linear_attention(packed)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith('gated_linear_attention runs as reference (')


def test_compiles_where_dynamo_can_not_ask_for_autocast(monkeypatch):
    # as in torch 2.11
    available = torch.compiler.disable(torch.amp.is_autocast_available)
    monkeypatch.setattr(torch.amp, 'is_autocast_available', available)
    packed = torch.randn(1, 20, 5, 2, 8)
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(packed), gated_linear_attention(packed))


def test_compiles_without_a_graph_break_and_exports_with_dynamic_tokens():
    packed = torch.randn(1, 20, 5, 2, 8)
    truth = gated_linear_attention(packed)
    compiled = torch.compile(gated_linear_attention, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(packed), truth)

    class Module(torch.nn.Module):
        def forward(self, x):
            return gated_linear_attention(x)

    dynamic = {'x': {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Module(), (packed,), dynamic_shapes=dynamic)
    longer = torch.randn(1, 33, 5, 2, 8)
    torch.testing.assert_close(program.module()(longer), gated_linear_attention(longer))
