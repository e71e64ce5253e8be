"""Counts of the token tensors that the kernels read and write, in the interpreter."""

import pytest
import torch

from saga_kernels.launch import decay_chunk, tile_config

interpreter = pytest.importorskip('triton.runtime.interpreter')


@pytest.fixture
def count(monkeypatch, triton_device):
    """Count loaded and stored elements of half precision, which are those of token tensors."""
    if triton_device != 'cpu':
        pytest.skip('counts accesses in the interpreter')
    counts = dict(load=0, store=0)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def add(kind, pointers, mask):
        if pointers.get_element_ty().primitive_bitwidth == 16:
            counts[kind] += int(mask.data.sum())

    def counted_load(self, pointers, mask, *rest):
        add('load', pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        add('store', pointers, mask)
        return store(self, pointers, value, mask, *rest)

    monkeypatch.setattr(builder, 'create_masked_load', counted_load)
    monkeypatch.setattr(builder, 'create_masked_store', counted_store)

    def tensors(function, size):
        """The result of a function, and how many token tensors it loads and stores."""
        counts.update(load=0, store=0)
        result = function()
        return result, (counts['load'] / size, counts['store'] / size)

    return tensors


def packed_of(tokens, parts):
    packed = torch.randn(1, tokens, parts, 2, 24).half()
    return packed, packed[:, :, 0].numel()


@pytest.mark.parametrize(
    ('parts', 'forward', 'backward'), [(5, (5, 1), (6, 5)), (3, (3, 1), (4, 3))]
)
def test_gated_reads_and_writes_each_tensor_once(parts, forward, backward, count):
    from saga_kernels.gated import kernel

    packed, size = packed_of(1100, parts)
    (out, state), traffic = count(lambda: kernel.forward(packed, None, True, 1e-6), size)
    assert traffic == forward
    grad = torch.randn_like(out)
    _, traffic = count(lambda: kernel.backward(grad, packed, state, None, True, 1e-6), size)
    assert traffic == backward


def test_rank_augmented_reads_q_twice_and_the_rest_once(count):
    from saga_kernels.rank_augmented import kernel

    qkv, size = packed_of(1100, 3)
    frequencies = torch.rand(6)
    (out, *kept), traffic = count(lambda: kernel.forward(qkv, frequencies, None, 50, 1e-6), size)
    # q; k and v; q.
    assert traffic == (4, 1)
    grad = torch.randn_like(out)
    _, traffic = count(lambda: kernel.backward(grad, qkv, *kept, None, 50, 1e-6), size)
    # q and do; k and v; q and do.
    assert traffic == (6, 3)


def test_decay_reads_the_tokens_of_a_chunk_again_for_each_tile_only(count):
    from saga_kernels.decay import kernel

    qkv, size = packed_of(600, 3)
    image = qkv, torch.tensor([-0.1, -1.0])
    chunk = decay_chunk(qkv.dtype, qkv.shape[-1])
    assert chunk < 600

    def tiles(name):
        return chunk // tile_config('decay', name, qkv.dtype, qkv.shape[-1])[0]

    (out, *sums), (loads, stores) = count(
        lambda: kernel.forward(*image, None, 30, True, 1e-6), size
    )
    # k and v for the states; q; and for each tile, k and v of its chunk, from L2.
    assert stores == 1
    assert 3 + 2 <= loads <= 3 + 2 * tiles('out_forward')
    grad = torch.randn_like(out)
    _, (loads, stores) = count(
        lambda: kernel.backward(grad, *image, out, *sums, None, 30, True), size
    )
    # q, o and do for the states; q, k, v and do; and these of the chunk, from L2.
    assert stores == 3
    assert 7 + 4 <= loads <= 7 + 4 * tiles('token_backward')


@pytest.mark.parametrize('masked', [False, True])
def test_wkv_reads_each_tensor_twice_and_writes_it_once(masked, count):
    from saga_kernels.wkv import kernel

    k, v, grad = torch.randn(3, 1, 140, 20).half()
    w, u = torch.rand(2, 1, 20)
    mask = torch.ones(1, 140, dtype=torch.bool) if masked else None
    size = k.numel()
    (_, *sums), traffic = count(lambda: kernel.forward(k, v, w, u, mask), size)
    # k and v for the states; k, v and o.
    assert traffic == (4, 1)
    _, traffic = count(lambda: kernel.backward(grad, k, v, w, u, *sums, mask), size)
    # k, v and do for the states; these, dk and dv.
    assert traffic == (6, 2)


# x, what is added, and the output; a residual reads x twice, once from the L1 cache. Programs of 16
# columns and of all rows: no pixel belongs to two of them, but the convolution reads K columns.
@pytest.mark.parametrize(('add', 'loads'), [('none', 1), ('map', 2), ('x', 2)])
def test_depthwise_reads_strided_maps_in_place(add, loads, count):
    from saga_kernels.depthwise import kernel

    wide = torch.randn(1, 8, 16, 3 * 32).half()
    x, other = wide[..., 32:64], torch.randn(1, 8, 16, 32).half()
    weight = torch.randn(32, 1, 3, 3)
    added = dict(none=None, map=other, x=x)[add]
    (out, traffic) = count(lambda: kernel.forward(x, weight, None, added, None), x.numel())
    # Each strip of 4 rows reads 6, and each pixel is read for 3 columns, but for the borders.
    reads = 3 * 5 * 2 / 8 * (1 - 2 / (3 * 16))
    assert traffic == (pytest.approx(reads + loads - 1), 1)
    grad = torch.randn_like(out)
    _, traffic = count(lambda: kernel.backward(grad, x, weight, None, add == 'x'), x.numel())
    # Each strip of 2 rows reads 4, or 3 at a border.
    reads = 3 * (4 * 4 - 2) / 8 * (1 - 2 / (3 * 16))
    assert traffic == (pytest.approx(reads + 1), 1)


def test_layer_norm_reads_and_writes_each_tensor_once(count):
    from saga_kernels.layer_norm import kernel

    x, weight = torch.randn(300, 24).half(), torch.randn(24)
    out, traffic = count(lambda: kernel.forward(x, weight, weight, 1e-6, x.dtype), x.numel())
    assert traffic == (1, 1)
    _, traffic = count(lambda: kernel.backward(out, x, weight, 1e-6), x.numel())
    assert traffic == (2, 1)


@pytest.mark.parametrize('side', [0, 3])
@pytest.mark.parametrize('gates', [0, 1])
def test_gated_attention_writes_nothing_but_v_and_its_output(gates, side, count):
    from saga_kernels.gated_attention import kernel

    height, width, channels = 30, 10, 64
    x, norm = torch.randn(1, height, width, channels).half(), torch.randn(2, channels).unbind()
    weights = torch.randn(5 * channels, channels).half(), torch.randn(channels, channels).half()
    in_proj, proj = ((weight, torch.randn(len(weight))) for weight in weights)
    lepe = (torch.randn(channels, 1, side, side), norm[1]) if side else None
    gate = proj if gates else None
    run = lambda: kernel.forward(  # noqa: E731
        x, norm, in_proj, proj, 1, lepe, gate, None, None, True, 1e-6, 1e-6, x.dtype
    )
    _, (loads, stores) = count(run, x.numel())
    tokens = height * width
    first, second = (
        -(-tokens // tile_config('gated_attention', name, x.dtype, channels)[0])
        for name in ('kv_forward', 'out_forward')
    )
    # x for both norms, and from a cache for the sum; v for each tap, but beyond the border; for
    # each tile the weights of k, v and the gates, and those of q, the gate and the output with A.
    taps = (side - 2 / height) * (side - 2 / width) if side else 0
    weights = 4 * first + (3 + gates) * second
    assert loads == pytest.approx(3 + taps + weights * channels / tokens)
    # v and the output, and A.
    assert stores == pytest.approx(2 + channels / tokens)


@pytest.mark.parametrize('hidden', [48, 192])
def test_ffn_writes_nothing_but_its_output(hidden, count):
    from saga_kernels.ffn import kernel

    x, norm = torch.randn(300, 24).half(), torch.randn(2, 24).unbind()
    fc1 = torch.randn(hidden, 24).half(), torch.randn(hidden)
    fc2 = torch.randn(24, hidden).half(), torch.randn(24)
    run = lambda: kernel.forward(x, norm, fc1, fc2, None, 1e-6, x.dtype)  # noqa: E731
    _, (loads, stores) = count(run, x.numel())
    # x for the norm, and from a cache for the sum; and for each tile both weights, from L2.
    tiles = -(-300 // tile_config('ffn', 'ffn_forward', x.dtype, 24)[0])
    assert (loads, stores) == (2 + tiles * 2 * hidden / 300, 1)
