"""Launch parameters and the memory traffic that follows from them, without GPU or Triton."""

import itertools

import pytest
import torch

from saga_kernels.chunks import ceil_div
from saga_kernels.launch import (
    ATTENTION_CHANNELS,
    FFN_CHANNELS,
    KERNELS,
    WKV_CHANNELS,
    WKV_CHUNK,
    WKV_STEPS,
    Launch,
    compile_options,
    decay_chunk,
    plan,
    tile_config,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DIMS = (8, 17, 24, 32, 48, 64, 80, 128)
CASES = [(op, kernel) for op, kernels in KERNELS.items() for kernel in kernels]
H200 = 132
TOKENS = (4096, 6400, 25600, 102400, 409600)


def kinds(op):
    """The dtypes and head dims, or channels, that an op takes."""
    most = dict(ffn=FFN_CHANNELS, gated_attention=ATTENTION_CHANNELS).get(op)
    return [
        (dtype, dim)
        for dtype, dim in itertools.product(DTYPES, DIMS)
        if most is None or dim <= most[dtype.itemsize]
    ]


def fp32_bytes(elements):
    return 4 * elements


@pytest.mark.parametrize(('op', 'phase'), CASES)
def test_programs_cover_every_token_once(op, phase):
    sizes = itertools.product(kinds(op), (1, 8, 100_000), (1, 49, 1000, *TOKENS))
    for (dtype, dim), heads, tokens in sizes:
        launch = plan(op, phase, dtype, dim, heads, tokens, H200)
        assert launch.span % launch.block == 0
        assert (launch.splits - 1) * launch.span < tokens <= launch.splits * launch.span
        assert launch.programs == heads * launch.splits
        # Some have too many tiles only for more tokens than fit into any GPU.
        if heads * tokens * dim <= 2**36:
            assert launch.programs < 2**31


# Kernels of 8 and of 4 warps, in bf16 with D = 64: programs, and tiles of each.
@pytest.mark.parametrize(
    ('heads', 'tokens', 'q_backward', 'kv_backward'),
    [
        # The sum of two partial states would take longer than a second tile.
        (8, 128, (8, 2), (16, 1)),
        # The stages of images of 224 x 224 and 800 x 1280 pixels.
        (1, 3136, (49, 1), (49, 1)),
        (8, 1000, (128, 1), (128, 1)),
        (5, 4000, (105, 3), (105, 3)),
        (2, 16000, (126, 4), (126, 4)),
        (1, 64000, (125, 8), (250, 4)),
        # Two programs of 8 warps on each of 132 processors, or four of 4.
        (8, 102400, (264, 49), (512, 25)),
        (256, 3136, (256, 49), (512, 25)),
    ],
)
def test_plan(heads, tokens, q_backward, kv_backward):
    for kernel, expected in dict(q_backward=q_backward, kv_backward=kv_backward).items():
        launch = plan('gated', kernel, torch.bfloat16, 64, heads, tokens, H200)
        assert (launch.programs, launch.span // launch.block) == expected


SPLIT = [case for case in CASES if case[0] in ('gated', 'rank_augmented') and case[1] != 'merge']


@pytest.mark.parametrize('processors', (16, 108, H200, 304))
def test_a_small_image_is_split_down_to_a_few_tiles(processors):
    sizes = itertools.product(SPLIT, DTYPES, DIMS, (1, 2, 5, 8, 16), (196, 1000, 3136, 25600))
    for (op, phase), dtype, dim, heads, tokens in sizes:
        launch = plan(op, phase, dtype, dim, heads, tokens, processors)
        assert launch.programs >= 0.75 * processors or launch.span <= 4 * launch.block
        if launch.programs > processors:
            # A program of its own must pay, as each reads or writes a state.
            assert launch.span >= min(256, tokens // ceil_div(processors, heads))


@pytest.mark.parametrize('processors', (16, 108, H200, 304))
def test_one_large_image_fills_the_gpu(processors):
    cases = [(op, phase, *kind) for op, phase in CASES for kind in kinds(op)]
    for (op, phase, dtype, dim), heads in itertools.product(cases, (1, 2, 8)):
        launch = plan(op, phase, dtype, dim, heads, 409600, processors)
        rounds = ceil_div(launch.programs, processors)
        assert rounds * launch.num_warps >= 16
        # Tokens of the busiest processor, and of all on average.
        assert rounds * launch.span <= 1.2 * heads * 409600 / processors + launch.span * (
            rounds > 8
        )


def test_many_heads_need_no_split():
    for op, phase in CASES:
        # Tokens of these are always split, into chunks and tiles.
        if op not in ('decay', 'wkv', 'ffn') and (op, phase) != ('gated_attention', 'out_forward'):
            assert plan(op, phase, torch.bfloat16, 64, 2048, 3136, H200).splits == 1


@pytest.mark.parametrize(('op', 'phase'), CASES)
def test_size_changes_no_compiler_option(op, phase):
    for dtype, dim in kinds(op):
        compiled = {
            (launch.block, launch.num_warps)
            for heads in (1, 8, 256)
            for tokens in (1, 49, *TOKENS)
            for launch in [plan(op, phase, dtype, dim, heads, tokens, H200)]
        }
        assert compiled == {tile_config(op, phase, dtype, dim)}


@pytest.mark.parametrize('hip', [None, '7.0'])
def test_matrix_instructions_of_amd_gpus_have_16_rows(hip, monkeypatch):
    starter = pytest.importorskip('saga_kernels.starter')
    calls = []

    class Kernel:
        arg_names = ('p_x', 'N')

        def __getitem__(self, grid):
            return lambda *values, **options: calls.append((grid, values, options))

    monkeypatch.setattr(torch.version, 'hip', hip)
    launch = Launch(block=16, span=32, splits=1, programs=3, num_warps=4)
    starter.Starter(Kernel(), torch.device('cpu'), launch, dict(N=20))(p_x=None)
    options = compile_options(num_warps=4, amd=hip is not None)
    assert calls == [((3,), (None, 20), options)]
    assert options.get('matrix_instr_nonkdim') == (16 if hip else None)


def state_traffic(op, phase, dtype, dim, heads, tokens):
    """Bytes of partial and summed states that one summing phase writes and its readers read.

    The reader of a summed state takes it from L2 for every tile; from memory, once.
    """
    splits = plan(op, phase, dtype, dim, heads, tokens, H200).splits
    state = fp32_bytes(heads * (dim + 1) * dim)
    # Written; with splits, read for the sum, which is written; read by the next kernel.
    return state * (splits + (splits + 1 if splits > 1 else 0) + 1)


# Token tensors forward and backward: test_triton_traffic.py counts what the kernels load and store.
@pytest.mark.parametrize(
    ('op', 'forward', 'backward'),
    [
        ('gated', (6, 'kv_forward'), (11, 'q_backward')),
        ('rank_augmented', (5, 'kv_forward'), (9, 'state_backward')),
    ],
)
@pytest.mark.parametrize('dim', DIMS)
def test_traffic_is_near_the_minimum(op, forward, backward, dim):
    """Or there are no more states than it takes to give each processor one of them."""
    bound = 1.15 if dim <= 64 else 1.2
    for dtype, heads, tokens in itertools.product(DTYPES, (1, 8, 32, 256), TOKENS):
        tensor = heads * tokens * dim * dtype.itemsize
        # The backward also reads the state of the forward, at most twice.
        states = 0, 2 * fp32_bytes(heads * (dim + 1) * dim)
        for (tensors, phase), state in zip((forward, backward), states, strict=True):
            traffic = tensors * tensor + state_traffic(op, phase, dtype, dim, heads, tokens)
            splits = plan(op, phase, dtype, dim, heads, tokens, H200).splits
            few = splits <= ceil_div(H200, heads)
            assert few or traffic + state <= bound * tensors * tensor


@pytest.mark.parametrize('dim', DIMS)
def test_the_states_of_chunks_cost_less_than_the_tokens(dim):
    for dtype, tokens in itertools.product(DTYPES, TOKENS):
        chunks = plan('decay', 'state_forward', dtype, dim, 1, tokens, H200).splits
        tensor = tokens * dim * dtype.itemsize
        states = fp32_bytes(chunks * 2 * (dim + 1) * dim)
        row = fp32_bytes(tokens)
        # Written, scanned in place and read; r is written.
        forward = 6 * tensor + 4 * states + row
        # The same, and the states of the forward read twice; r and delta, written once, read.
        backward = 10 * tensor + 6 * states + 4 * row
        assert forward <= 1.75 * 6 * tensor
        assert backward <= 1.65 * 10 * tensor


@pytest.mark.parametrize('dtype', DTYPES)
def test_wkv_states_and_token_tensors(dtype):
    chunks = plan('wkv', 'state_forward', dtype, 1, 6, 102400, H200).splits
    # Per channel: two states of three numbers for a chunk, one for each of its tiles.
    tensor = 102400 * dtype.itemsize
    states = fp32_bytes(6 * chunks) / tensor
    tiles = fp32_bytes(3 * chunks * (WKV_CHUNK // WKV_STEPS)) / tensor
    # Written, read by the scan, written and read again; in the backward pass also those of the
    # forward pass, twice. Those of tiles are written and read; in the backward pass, of two kinds,
    # and those of the forward pass are read again.
    assert 5 + 4 * states + 2 * tiles <= 7.3
    assert 8 + 6 * states + 5 * tiles <= 12.9


@pytest.mark.parametrize('kernel', KERNELS['wkv'])
def test_wkv_fills_a_gpu_with_one_image(kernel):
    blocks = ceil_div(96, WKV_CHANNELS[kernel])
    if kernel != 'scan':
        launch = plan('wkv', kernel, torch.bfloat16, 1, blocks, 102400, H200)
        assert launch.block == WKV_CHUNK
        assert launch.programs >= 8 * H200


def test_tiles_of_decay_divide_its_chunks():
    for phase, dtype, dim in itertools.product(KERNELS['decay'], DTYPES, DIMS):
        if phase != 'scan':
            assert decay_chunk(dtype, dim) % tile_config('decay', phase, dtype, dim)[0] == 0
