"""What the kernels load and store, counted in the interpreter: each token tensor once."""

import pytest
import torch

from saga_kernels.launch import plan

interpreter = pytest.importorskip('triton.runtime.interpreter')
# The interpreter's plan.
PROCESSORS = 132


@pytest.fixture
def count(monkeypatch, triton_device):
    """Elements loaded and stored, by element size in bytes: 2 token tensors, 4 states."""
    if triton_device != 'cpu':
        pytest.skip('counts accesses in the interpreter')
    counts = {('load', 2): 0, ('load', 4): 0, ('store', 2): 0, ('store', 4): 0}
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def add(kind, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        counts[kind, size] += int(mask.data.sum())

    def counted_load(self, pointers, mask, *rest):
        add('load', pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        add('store', pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, 'create_masked_load', counted_load)
    monkeypatch.setattr(builder, 'create_masked_store', counted_store)
    return counts


@pytest.mark.parametrize(
    ('parts', 'forward', 'backward'), [(5, (5, 1), (6, 5)), (3, (3, 1), (4, 3))]
)
def test_each_token_tensor_is_read_once_and_written_once(parts, forward, backward, count):
    from saga_kernels.gated import kernel

    heads, tokens, dim = 2, 1100, 24
    packed = torch.randn(1, tokens, parts, heads, dim).half()
    tensor, state = heads * tokens * dim, heads * (dim + 1) * dim
    out, sums = kernel.forward(packed, None, True, 1e-6)
    assert (count['load', 2], count['store', 2]) == tuple(n * tensor for n in forward)

    def splits(phase):
        return plan('gated', phase, packed.dtype, dim, heads, tokens, PROCESSORS).splits

    assert splits('kv_forward') > 1
    assert count['store', 4] == splits('kv_forward') * state
    assert count['load', 4] == splits('out_forward') * state

    count.update(dict.fromkeys(count, 0))
    kernel.backward(torch.randn_like(out), packed, sums, None, True, 1e-6)
    assert (count['load', 2], count['store', 2]) == tuple(n * tensor for n in backward)
    assert count['store', 4] == splits('q_backward') * state
    row_z = heads * dim
    by_kv = splits('kv_backward') * (state + row_z)
    assert count['load', 4] == splits('q_backward') * state + by_kv
