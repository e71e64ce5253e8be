"""The host side of the kernels: launch parameters, partial results, and the launch itself.

Launch parameters are plain functions of a shape and a GPU; nothing is searched for at run time. A
compiled kernel depends on dtype and head dim alone. The image size only changes how many tokens one
program takes, so a new resolution compiles nothing.
"""

import contextlib
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

# Tokens of `wkv` that share a state, those of them that a thread goes through one by one, and
# channels of a program. A thread of `token_backward` would spill registers with more than one.
WKV_CHUNK = 256
WKV_STEPS = 8
WKV_CHANNELS = dict(state_forward=16, scan=4, out_forward=16, state_backward=16, token_backward=8)

# Channels of a program of `depthwise`, and its columns by the side of the filter: with larger
# filters, a thread holds more weights, so it takes fewer pixels.
DEPTHWISE_CHANNELS = 32
DEPTHWISE_COLUMNS = {1: 16, 3: 16, 5: 8}


def _always(tile: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """The same tile and warps for every size of element and head dim."""
    return dict.fromkeys(itertools.product((2, 4), (32, 64, 128)), tile)


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
            (2, 32): (64, 4), (2, 64): (32, 8), (2, 128): (16, 8),
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
        'state_forward': _always((WKV_CHUNK, 8)),
        # Chunks per tile.
        'scan': _always((256, 4)),
        'out_forward': _always((WKV_CHUNK, 8)),
        'state_backward': _always((WKV_CHUNK, 8)),
        'token_backward': _always((WKV_CHUNK, 8)),
    },
    # Rows per tile.
    'depthwise': {
        'conv_forward': _always((4, 4)),
        'conv_backward': _always((2, 4)),
    },
}  # fmt: skip
KERNELS = {op: tuple(tiles) for op, tiles in TILES.items()}
# Kernels whose programs leave partial states behind.
_SUMMING = {
    'gated': ('kv_forward', 'q_backward'),
    'rank_augmented': ('kv_forward', 'state_backward'),
    'depthwise': ('conv_backward',),
}

# The next tile is loaded while one is worked on.
NUM_STAGES = 2
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
        dim: Head dim D; no matter for `wkv`; side of the filter of `depthwise`.
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
    if op == 'wkv':
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
    if kernel in _SUMMING[op]:
        # Each program writes a partial state, D + 1 rows of fp32, which another kernel reads.
        return 256 if dim <= 32 else 384 if dim <= 64 else 640
    # Each program reads the state from the L2 cache.
    return 256


def new_states(packed: Tensor, splits: int = 1) -> Tensor:
    """Uninitialised memory for partial states, (B, H, splits, D + 1, D) in fp32."""
    batch, _, _, heads, dim = packed.shape
    return packed.new_empty((batch, heads, splits, dim + 1, dim), dtype=torch.float32)


def sum_partials(partial: Tensor) -> Tensor:
    """Sum of partial results over the splits, axis 2, in a fixed order."""
    return partial[:, :, 0] if partial.shape[2] == 1 else partial.sum(2)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which kernels are launched on the GPU of a tensor, or interpreted on a CPU."""
    if x.device.type == 'cuda':
        return torch.cuda.device(x.device)
    from .interpreter import repaired

    return repaired()


def launch_of(op: str, kernel: str, packed: Tensor) -> Launch:
    """Parameters of one launch over the tokens of a packed projection."""
    batch, tokens, _, heads, dim = packed.shape
    return plan(op, kernel, packed.dtype, dim, batch * heads, tokens, processors(packed.device))


def precision(packed: Tensor) -> str:
    """The precision of matrix products of a packed projection, see `product_precision`."""
    nvidia = packed.device.type == 'cuda' and torch.version.hip is None
    return product_precision(packed.shape[-1], nvidia)


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides of a tensor; zero where an axis has length one, whose stride is arbitrary."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True))


def alignment(*sizes: int) -> int:
    """The largest power of two, at most 16, that divides all sizes; a kernel is compiled for it."""
    return math.gcd(16, *sizes)


def run(kernel, launch: Launch, packed: Tensor, mask: Tensor | None, **arguments) -> None:
    """Launch a kernel over the tokens of a packed projection (B, N, parts, H, D)."""
    _, tokens, _, heads, dim = packed.shape
    x_b, x_n, _, x_h, _ = strides(packed)
    others = (size for name, size in arguments.items() if name in ('x_p', 'do_b', 'do_n', 'do_h'))
    mask_b, mask_n = (0, 0) if mask is None else mask.stride()
    with on_device(packed):
        kernel[(launch.programs,)](
            p_x=packed, p_mask=mask, N=tokens, H=heads, SPAN=launch.span,
            x_b=x_b, x_n=x_n, x_h=x_h, mask_b=mask_b, mask_n=mask_n,
            D=dim, BD=padded_dim(dim), BN=launch.block, num_warps=launch.num_warps,
            ALIGN=alignment(dim, x_b, x_n, x_h, *others), num_stages=NUM_STAGES, **arguments,
        )  # fmt: skip
