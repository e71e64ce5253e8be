"""Launch parameters of the kernels, and memory for their partial results.

Launch parameters are plain functions of a shape and a GPU; nothing is searched for at run time. A
compiled kernel depends on dtype and head dim alone. The image size only changes how many tokens one
program takes, so a new resolution compiles nothing.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunks import ceil_div

# The most programs per processor that a split over tokens makes. More would only start more often.
PROGRAMS_PER_PROCESSOR = 8
# Warps with which a processor works at full speed. With 128 registers a thread they run at a time;
# programs that take more run half as many at a time, which makes no difference to the plan.
BUSY_WARPS = 16
# What programs take besides their tiles, in tiles: to start one and to read or write a state, and
# to launch the sum of partial states.
START = 2
SUM = 4

# Tokens of `wkv` that share a state, those of a tile, which a thread holds in registers, and
# channels of a program. A program of one warp takes the chunk tile by tile; a thread has two
# channels, or one in `token_backward`, which would spill registers with two.
WKV_CHUNK = 64
WKV_STEPS = 8
WKV_CHANNELS = dict(state_forward=64, scan=4, out_forward=64, state_backward=64, token_backward=32)

# Channels of a program of `depthwise`, and its columns by the side of the filter: with larger
# filters, a thread holds more weights, so it takes fewer pixels.
DEPTHWISE_CHANNELS = 32
DEPTHWISE_COLUMNS = {1: 16, 3: 16, 5: 8}
# The most channels of `layer_norm`, all of which a program holds in registers.
NORM_CHANNELS = 1024
# The most channels of `ffn`, by bytes per element of the products. Each program reads all weights:
# with more channels it would hold fewer tokens and read more weights, until that takes longer than
# the traffic that the kernel saves.
FFN_CHANNELS = {2: 128, 4: 64}
# Hidden channels of `ffn` that a program computes at a time, by bytes per element and padded
# channels.
FFN_HIDDEN = {(2, 32): 64, (2, 64): 64, (2, 128): 32, (4, 32): 32, (4, 64): 32}


# The most channels of `gated_attention`, for the same reason, and of one of its heads. In fp32 with
# 64 channels, its first kernel spills 12 KiB per thread on sm_80.
ATTENTION_CHANNELS = {2: 128, 4: 32}
ATTENTION_HEAD_DIM = 64


def _always(tile: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """The same tile and warps for every size of element and head dim."""
    return dict.fromkeys(itertools.product((2, 4), (32, 64, 128)), tile)


def _rows(elements: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Tiles of about so many elements, of 4 warps, by bytes per element and padded channels."""
    edges = (2**n for n in range(5, NORM_CHANNELS.bit_length()))
    return {(size, edge): (elements // edge, 4) for edge in edges for size in (2, 4)}


# Tokens per tile and warps of every kernel, by bytes per element and edge of the matrix tile. The
# kernels of an op stand in the order in which they run.
# They were chosen by what the compiler reports (docs/benchmarks/kernels.md), not by measurements on
# a GPU. In half precision with D up to 64 the kernels spill no registers, except for a few bytes in
# `decay`, two of whose kernels would read more memory with smaller tiles. With D = 128, and in fp32
# with D = 64, some kernels spill on sm_80. In fp32 with D = 128 some spill on every GPU.
TILES: dict[str, dict[str, dict[tuple[int, int], tuple[int, int]]]] = {
    'gated': {
        'kv_forward': {
            (2, 32): (32, 4), (2, 64): (64, 8), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
        'out_forward': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (64, 8),
            (4, 32): (32, 4), (4, 64): (32, 4), (4, 128): (16, 8),
        },
        'q_backward': {
            (2, 32): (64, 4), (2, 64): (64, 8), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
        'kv_backward': {
            (2, 32): (128, 8), (2, 64): (64, 4), (2, 128): (16, 8),
            (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
    },
    'rank_augmented': {
        'mean_forward': {
            (2, 32): (64, 8), (2, 64): (64, 4), (2, 128): (32, 4),
            (4, 32): (64, 4), (4, 64): (32, 4), (4, 128): (16, 4),
        },
        'kv_forward': {
            (2, 32): (64, 4), (2, 64): (64, 8), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 8), (4, 128): (16, 8),
        },
        # Partial states per tile.
        'merge': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (64, 4),
            (4, 32): (64, 4), (4, 64): (64, 4), (4, 128): (64, 4),
        },
        'out_forward': {
            (2, 32): (64, 4), (2, 64): (64, 8), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 8), (4, 128): (16, 8),
        },
        'state_backward': {
            (2, 32): (32, 4), (2, 64): (64, 8), (2, 128): (16, 8),
            (4, 32): (32, 4), (4, 64): (16, 8), (4, 128): (16, 8),
        },
        'kv_backward': {
            (2, 32): (16, 4), (2, 64): (16, 4), (2, 128): (16, 8),
            (4, 32): (16, 4), (4, 64): (16, 8), (4, 128): (16, 8),
        },
        'q_backward': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (16, 8),
            (4, 32): (32, 4), (4, 64): (16, 8), (4, 128): (16, 8),
        },
    },
    'decay': {
        'state_forward': {
            (2, 32): (64, 4), (2, 64): (32, 4), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
        # Chunks per tile.
        'scan': {
            (2, 32): (32, 4), (2, 64): (32, 4), (2, 128): (32, 4),
            (4, 32): (32, 4), (4, 64): (32, 4), (4, 128): (32, 4),
        },
        'out_forward': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (32, 4), (4, 128): (16, 8),
        },
        'state_backward': {
            (2, 32): (64, 4), (2, 64): (32, 4), (2, 128): (32, 8),
            (4, 32): (32, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
        'token_backward': {
            (2, 32): (32, 4), (2, 64): (32, 4), (2, 128): (32, 8),
            (4, 32): (16, 4), (4, 64): (16, 4), (4, 128): (16, 8),
        },
    },
    # A tile is a chunk of tokens with some channels, whatever their number is.
    'wkv': {
        'state_forward': _always((WKV_CHUNK, 1)),
        # Chunks per tile.
        'scan': _always((256, 4)),
        'out_forward': _always((WKV_CHUNK, 1)),
        'state_backward': _always((WKV_CHUNK, 1)),
        'token_backward': _always((WKV_CHUNK, 1)),
    },
    # Rows per tile.
    'depthwise': {
        'conv_forward': _always((4, 4)),
        'conv_backward': _always((2, 4)),
    },
    'layer_norm': {
        'norm_forward': _rows(4096),
        'norm_backward': _rows(2048),
    },
    # Bytes per element are those of the weights.
    'ffn': {
        'ffn_forward': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (64, 4),
            (4, 32): (64, 4), (4, 64): (32, 4),
        },
    },
    # Likewise.
    'gated_attention': {
        'kv_forward': {
            (2, 32): (64, 4), (2, 64): (128, 8), (2, 128): (128, 8),
            (4, 32): (32, 4),
        },
        # Partial states per tile.
        'merge': {
            (2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (64, 4),
            (4, 32): (64, 4),
        },
        'out_forward': {
            (2, 32): (32, 4), (2, 64): (32, 4), (2, 128): (32, 8),
            (4, 32): (32, 4),
        },
    },
}  # fmt: skip
KERNELS = {op: tuple(tiles) for op, tiles in TILES.items()}
# Kernels whose programs leave partial states behind.
_SUMMING = {
    'gated': ('kv_forward', 'q_backward'),
    'rank_augmented': ('kv_forward', 'state_backward'),
    'depthwise': ('conv_backward',),
    'layer_norm': ('norm_backward',),
    'gated_attention': ('kv_forward',),
}

# Elements of a state that one program of the kernel `merge` adds up.
MERGED = 32


@dataclass(frozen=True)
class Launch:
    """How one kernel runs.

    Attributes:
        block: Tokens per tile.
        span: Tokens per program, a multiple of `block`.
        splits: Programs per image and head.
        programs: Size of the grid; it has one axis.
        num_warps: Warps per program.
    """

    block: int
    span: int
    splits: int
    programs: int
    num_warps: int


def compile_options(num_warps: int, amd: bool) -> dict[str, int]:
    """What Triton's compiler is told besides the arguments of a kernel.

    The next tile is loaded while one is worked on. On AMD GPUs, matrix instructions have 16 rows
    and columns. Triton would take 32 otherwise, and a tile often has too few rows to give each warp
    32 of its own: some warps compute the same as others, and registers spill
    (docs/benchmarks/kernels.md).
    """
    options = dict(num_warps=num_warps, num_stages=2)
    return options | dict(matrix_instr_nonkdim=16) if amd else options


def padded_dim(dim: int) -> int:
    """Head dim rounded up to the next power of two, at least 16: the edge of a matrix tile."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors (compute units) of a GPU.

    The interpreter plans for a large GPU.
    """
    cuda = device.type == 'cuda'
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132


def is_nvidia(device: torch.device) -> bool:
    return device.type == 'cuda' and torch.version.hip is None


def product_precision(dim: int, nvidia: bool) -> str:
    """The precision of matrix products of fp32 operands, in Triton's words.

    Three products in tf32 are as exact as one in fp32, and run on the tensor cores. They keep two
    parts of each operand in shared memory, which with D > 64 is more than a GPU has.
    """
    return 'tf32x3' if nvidia and dim <= 64 else 'ieee'


def tile_config(op: str, kernel: str, dtype: torch.dtype, dim: int) -> tuple[int, int]:
    """Tokens per tile and warps per program of a kernel."""
    return TILES[op][kernel][dtype.itemsize, max(32, padded_dim(dim))]


def decay_chunk(dtype: torch.dtype, dim: int) -> int:
    """Tokens of `decay` that share a state; a multiple of the tokens of every tile.

    Longer chunks leave fewer states to read and write. But the tokens of a chunk meet each other,
    which takes time in proportion to its length. With this length, the states of an image have
    about as many bytes as one of its token tensors.
    """
    return max(64, 8 * padded_dim(dim) // dtype.itemsize)


@functools.lru_cache(4096)
def plan(
    op: str, kernel: str, dtype: torch.dtype, dim: int, heads: int, tokens: int, processors: int
) -> Launch:
    """Parameters of one launch.

    The ops that sum states over all tokens are split such that the processors finish together, see
    `_duration`. Small images are split into as many programs as there are processors, down to one
    tile; on large ones, the partial states add at most some 15 % to the traffic. The chunks of
    `decay` and `wkv` follow from the dtype and head dim alone.

    Args:
        op: Name of the op, a key of `KERNELS`.
        kernel: Name of one of its kernels.
        dtype: Dtype of the packed projection: float16, bfloat16 or float32.
        dim: Head dim D; no matter for `wkv`; side of the filter of `depthwise`, and channels of
            `layer_norm`, `ffn` and `gated_attention`.
        heads: Images times heads, B * H; for `wkv`, times blocks of channels, and for `depthwise`,
            times blocks of columns and of channels.
        tokens: N, at least 1; for `depthwise`, rows of the map.
        processors: Streaming multiprocessors (compute units) of the GPU.
    """
    block, num_warps = tile_config(op, kernel, dtype, dim)
    if op == 'decay':
        span = decay_chunk(dtype, dim) if kernel.startswith('state') else block
        splits = ceil_div(tokens, span)
        return Launch(block, span, splits, heads * splits, num_warps)
    if op in ('wkv', 'ffn') or (op, kernel) == ('gated_attention', 'out_forward'):
        splits = ceil_div(tokens, block)
        return Launch(block, block, splits, heads * splits, num_warps)
    tiles = ceil_div(tokens, block)
    # As many as add little traffic, or as many as the processors.
    most = max(tokens // _shortest(op, kernel, dim), ceil_div(processors, heads))
    rounds = range(1, PROGRAMS_PER_PROCESSOR + 1)
    choices = {1} | {min(most, n * processors // heads) for n in rounds} - {0}
    spans = {ceil_div(tiles, splits) for splits in choices}
    summing = kernel in _SUMMING[op]
    span = block * min(
        sorted(spans, reverse=True),
        key=lambda span: _duration(
            span, ceil_div(tiles, span), heads, num_warps, summing, processors
        ),
    )
    splits = ceil_div(tokens, span)
    return Launch(block, span, splits, heads * splits, num_warps)


def _duration(
    span: int, splits: int, heads: int, num_warps: int, summing: bool, processors: int
) -> float:
    """How long a launch takes, in the time that a tile takes a busy processor.

    All wait for the processor that gets the most programs. With few warps it is not busy: they wait
    for memory, though less than in proportion.
    """
    rounds = ceil_div(heads * splits, processors)
    time = (rounds + max(rounds, BUSY_WARPS // num_warps)) / 2 * (span + START)
    return time + SUM if summing and splits > 1 else time


def _shortest(op: str, kernel: str, dim: int) -> int:
    """The fewest tokens for which a program of its own pays on a GPU that is busy."""
    if op == 'depthwise':
        # Rows: each program reads some beyond its own, and loads the weights.
        return 32
    if op == 'layer_norm':
        # Each program loads the weights, and writes two sums for each channel.
        return 128
    if kernel in _SUMMING[op]:
        # Each program writes a partial state, D + 1 rows of fp32, which another kernel reads.
        return 256 if dim <= 32 else 384 if dim <= 64 else 640
    # Each program reads the state from the L2 cache.
    return 256


def new_partials(packed: Tensor, splits: int, *shape: int) -> Tensor:
    """Uninitialised memory in fp32 for partial results of a shape: (B, H, splits, *shape).

    A single one is the result, and has no axis for splits: to remove that would take time.
    """
    batch, _, _, heads, _ = packed.shape
    axis = (splits,) if splits > 1 else ()
    return packed.new_empty((batch, heads, *axis, *shape), dtype=torch.float32)


def sum_partials(partial: Tensor, splits: int) -> Tensor:
    """Sum of partial results over the splits in a fixed order, (B, H, *shape)."""
    return partial.sum(2) if splits > 1 else partial


def meaningful(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides; zero where an axis has length one, whose stride is arbitrary."""
    return tuple(0 if n == 1 else step for n, step in zip(shape, stride, strict=True))


def alignment(*sizes: int) -> int:
    """The largest power of two, at most 16, that divides all sizes; a kernel is compiled for it."""
    return math.gcd(16, *sizes)
