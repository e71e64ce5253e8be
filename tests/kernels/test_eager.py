"""The eager implementations agree with the specification of each op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness import BOUNDS, rms_ratio
from saga_kernels import kv_state, read_state, sum_states
from saga_kernels.decay import eager as decay_eager
from saga_kernels.decay import reference as decay
from saga_kernels.gated import eager as gated_eager
from saga_kernels.gated import reference as gated
from saga_kernels.rank_augmented import eager as rank_augmented_eager
from saga_kernels.rank_augmented import reference as rank_augmented

SIZE = (7, 20)
EPS = 1e-6


def gated_op(module, feature_map):
    return lambda packed, mask: module.attend(packed, feature_map, EPS, mask)


def rank_augmented_op(module):
    frequencies = torch.tensor([1.0, 0.1])
    return lambda packed, mask: module.attend(packed, SIZE, frequencies, EPS, mask)


def decay_op(module, feature_map):
    log_decay = torch.tensor([-0.5, -0.01, -2.0])
    return lambda packed, mask: module.attend(packed, log_decay, SIZE, feature_map, EPS, mask)


# Parts of the packed projection, the eager implementation, and the specification.
OPS = {
    'gated': (5, gated_op(gated_eager, 'elu'), gated_op(gated, 'elu')),
    'plain': (3, gated_op(gated_eager, 'relu'), gated_op(gated, 'relu')),
    'rank_augmented': (
        3,
        rank_augmented_op(rank_augmented_eager),
        rank_augmented_op(rank_augmented),
    ),
    'decay': (3, decay_op(decay_eager, 'elu'), decay_op(decay, 'elu')),
    'decay_relu': (3, decay_op(decay_eager, 'relu'), decay_op(decay, 'relu')),
}


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def packed_of(parts, dtype=torch.float64, batch=2):
    return torch.randn(batch, SIZE[0] * SIZE[1], parts, 3, 8, dtype=torch.float64).to(dtype)


def mask_of(packed, masked):
    return torch.rand(packed.shape[:2]) > 0.4 if masked else None


@pytest.mark.parametrize('masked', [False, True])
def test_values_and_gradients_in_float64(op, masked):
    parts, attend, specification = op
    packed = packed_of(parts).requires_grad_()
    mask = mask_of(packed, masked)
    out, truth = attend(packed, mask), specification(packed, mask)
    grad_out = torch.randn_like(out)
    grad, exact = (torch.autograd.grad(x, packed, grad_out)[0] for x in (out, truth))
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-10)
    # A row that is zero after ReLU has a gradient of 1 / eps, so the bound is on the ratio.
    torch.testing.assert_close(grad, exact, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('dtype', BOUNDS)
def test_every_dtype_against_float64(op, masked, dtype):
    parts, attend, specification = op
    packed = packed_of(parts, dtype).abs().requires_grad_()
    mask = mask_of(packed, masked)
    exact = packed.detach().double().requires_grad_()
    out, truth = attend(packed, mask), specification(exact, mask)
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, packed, grad_out)
    (exact_grad,) = torch.autograd.grad(truth, exact, grad_out.double())
    assert (out.dtype, grad.dtype) == (dtype, dtype)
    assert rms_ratio(out, truth.detach()) < BOUNDS[dtype]
    assert rms_ratio(grad, exact_grad) < BOUNDS[dtype]


def test_second_derivatives(op):
    parts, attend, specification = op
    packed = packed_of(parts, batch=1).requires_grad_()
    results = []
    for function in attend, specification:
        (grad,) = torch.autograd.grad(function(packed, None).sin().sum(), packed, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), packed)[0])
    assert results[1].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('budget', [1, 4000, 9000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_size_of_chunks(op, masked, budget, dtype, chunk_budget):
    parts, attend, _ = op
    packed = packed_of(parts, dtype)
    mask = mask_of(packed, masked)
    with torch.no_grad():
        whole = attend(packed, mask)
        chunk_budget(budget)
        torch.testing.assert_close(attend(packed, mask), whole)


class LargestProduct(TorchDispatchMode):
    """Records the longest axis of all operands of matrix products."""

    longest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            self.longest = max(self.longest, *args[0].shape, *args[1].shape)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['gated', 'plain', 'rank_augmented'])
def test_chunks_are_for_inference_alone(name, chunk_budget):
    parts, attend, _ = OPS[name]
    packed = packed_of(parts, torch.float32)
    chunk_budget(packed.numel() // 10)
    with torch.no_grad(), LargestProduct() as without_grad:
        attend(packed, None)
    with LargestProduct() as with_grad:
        attend(packed, None)
    assert without_grad.longest < packed.shape[1] // 2
    assert with_grad.longest == packed.shape[1]


@pytest.mark.parametrize('parts', [3, 5])
@pytest.mark.parametrize('feature_map', ['elu', 'relu'])
@pytest.mark.parametrize('masked', [False, True])
def test_states_of_parts_add_up(parts, feature_map, masked):
    packed = packed_of(parts)
    mask = torch.ones(packed.shape[:2], dtype=torch.bool)
    if masked:
        mask = mask_of(packed, masked)
    states = [
        kv_state(*chunk[:, :, 1:].unbind(2), feature_map=feature_map, mask=visible)
        for chunk, visible in zip(packed.split(30, 1), mask.split(30, 1), strict=True)
    ]
    state = sum_states(states)
    assert (state.sums.shape, state.normalizer.shape) == ((2, 3, 8, 8), (2, 3, 8))
    outs = [
        read_state(query, state, feature_map=feature_map, mask=visible)
        for query, visible in zip(packed[:, :, 0].split(9, 1), mask.split(9, 1), strict=True)
    ]
    truth = gated.attend(packed, feature_map, EPS, mask)
    torch.testing.assert_close(torch.cat(outs, 1), truth, rtol=0, atol=1e-10)


def test_gates_come_in_pairs():
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match='gates must be none or two tensors, got 1'):
        kv_state(x, x, x)
