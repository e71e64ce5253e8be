"""What the kernels load and store, counted in the interpreter: each token tensor once."""

import pytest
import torch

from saga_kernels.launch import MERGED, decay_chunk, plan, tile_config

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


def test_rank_augmented_reads_q_twice_and_the_rest_once(count):
    from saga_kernels.rank_augmented import kernel

    heads, tokens, dim = 2, 1100, 24
    qkv = torch.randn(1, tokens, 3, heads, dim).half()
    frequencies = torch.rand(dim // 4)
    tensor, state, row = heads * tokens * dim, heads * (dim + 1) * dim, heads * dim
    # Of the rotation, for each program: half turns of each pair of channels.
    turns = row // 2

    def splits(phase):
        return plan('rank_augmented', phase, qkv.dtype, dim, heads, tokens, PROCESSORS).splits

    out, *sums = kernel.forward(qkv, frequencies, None, 50, 1e-6)
    # q; k and v; q. The rows of z come once more, for the scale of the channels.
    assert (count['load', 2], count['store', 2]) == (4 * tensor, tensor)
    by_kv = splits('kv_forward')
    assert by_kv > 1
    assert count['store', 4] == splits('mean_forward') * row + (by_kv + 1) * (state + heads)
    by_merge = by_kv * (state + heads * -(-(dim + 1) * dim // MERGED))
    by_out = splits('out_forward') * (state + 2 * row + turns)
    assert count['load', 4] == by_kv * (row + turns) + by_merge + by_out

    count.update(dict.fromkeys(count, 0))
    kernel.backward(torch.randn_like(out), qkv, frequencies, *sums, None, 50, 1e-6)
    # q and do; k and v; q and do.
    assert (count['load', 2], count['store', 2]) == (6 * tensor, 3 * tensor)
    by_state = splits('state_backward')
    assert count['store', 4] == by_state * state + splits('kv_backward') * row
    one = state + 2 * row + turns
    by_kv = splits('kv_backward') * (one + state + row + heads)
    assert count['load', 4] == by_state * one + by_kv + splits('q_backward') * (one + row)


def test_decay_reads_k_and_v_for_the_states_and_again(count):
    from saga_kernels.decay import kernel

    heads, tokens, dim = 2, 600, 24
    qkv, log_decay = torch.randn(1, tokens, 3, heads, dim).half(), torch.tensor([-0.1, -1.0])
    length = decay_chunk(qkv.dtype, dim)
    sizes = [min(length, tokens - begin) for begin in range(0, tokens, length)]
    assert len(sizes) > 1
    tensor, row = heads * tokens * dim, heads * tokens
    state = heads * (dim + 1) * dim
    states = 2 * len(sizes) * state

    def tiles(phase):
        """How many there are, and how many tokens they read if each reads its chunk."""
        block, _ = tile_config('decay', phase, qkv.dtype, dim)
        counts = [-(-size // block) for size in sizes]
        return sum(counts), heads * sum(map(int.__mul__, counts, sizes))

    out, *sums = kernel.forward(qkv, log_decay, None, 30, True, 1e-6)
    number, again = tiles('out_forward')
    # k and v; q, and from L2 for all tiles of a chunk but one, k and v.
    assert (count['load', 2], count['store', 2]) == (3 * tensor + 2 * again * dim, tensor)
    assert again < 3 * row
    # P and R, which the scan turns into F and B; r. Each program reads the decay of its head.
    assert count['store', 4] == 2 * states + row
    scans = heads * 2 * (dim + 1)
    programs = heads * (len(sizes) + number) + scans
    assert count['load', 4] == states + number * 2 * state + programs

    count.update(dict.fromkeys(count, 0))
    kernel.backward(torch.randn_like(out), qkv, log_decay, out, *sums, None, 30, True)
    number, again = tiles('token_backward')
    # q, o and do; q, k, v and do, and these from L2.
    assert (count['load', 2], count['store', 2]) == (7 * tensor + 4 * again * dim, 3 * tensor)
    # GF and GB likewise; delta; what the scan and the tiles know of the gradient of the decay.
    assert count['store', 4] == 2 * states + row + scans + heads * number
    programs = heads * (len(sizes) + number) + scans
    # r; by the scan all four states; by tiles too, and r, delta, and from L2 those of the chunk.
    assert count['load', 4] == 3 * row + 2 * states + number * 4 * state + 2 * again + programs
