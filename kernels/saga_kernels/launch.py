"""Launch parameters of the kernels: plain functions of a shape and a GPU, no search at run time.

A compiled kernel depends on dtype and head dim alone. The image size only changes how many tokens
one program takes, so a new resolution compiles nothing.
"""

import functools
from dataclasses import dataclass

import torch

# Programs per processor that the split over tokens aims at: several are resident at a time, and
# enough follow that the last ones to finish leave little idle.
PROGRAMS_PER_PROCESSOR = 8

# The kernels of each op, in the order in which they run.
PHASES = {
    'gated': ('kv_forward', 'out_forward', 'q_backward', 'kv_backward'),
    'rank_augmented': (
        'mean_forward',
        'kv_forward',
        'merge',
        'out_forward',
        'state_backward',
        'kv_backward',
        'q_backward',
    ),
    'decay': ('state_forward', 'scan', 'out_forward', 'state_backward', 'token_backward'),
}
# Phases whose programs leave partial states behind.
_SUMMING = {
    'gated': ('kv_forward', 'q_backward'),
    'rank_augmented': ('kv_forward', 'state_backward'),
}

# Tokens per tile and warps, phase by phase, by bytes per element and edge of the matrix tile.
# Chosen by what the compiler reports (docs/benchmarks/kernels.md), not by a measurement: no spilled
# registers in half precision up to D = 64, but for a few bytes in `decay`, two of whose kernels
# would read more with smaller tiles. With D = 128, or in fp32 with D = 64, some kernels spill on
# sm_80; in fp32 with D = 128 on every GPU.
_TILES = {
    'gated': {
        (2, 32): ((64, 8), (64, 4), (64, 4), (128, 8)),
        (2, 64): ((64, 8), (64, 4), (64, 8), (16, 4)),
        (2, 128): ((32, 8), (64, 8), (32, 8), (16, 8)),
        (4, 32): ((32, 4), (32, 4), (32, 4), (32, 4)),
        (4, 64): ((16, 4), (32, 4), (16, 4), (16, 4)),
        (4, 128): ((16, 8), (16, 8), (16, 8), (16, 8)),
    },
    # Of `merge`: partial states per tile.
    'rank_augmented': {
        (2, 32): ((64, 8), (64, 4), (64, 4), (64, 4), (32, 4), (16, 4), (64, 4)),
        (2, 64): ((64, 4), (64, 8), (64, 4), (64, 8), (64, 8), (16, 4), (32, 8)),
        (2, 128): ((32, 4), (32, 8), (64, 4), (32, 8), (16, 8), (16, 8), (16, 8)),
        (4, 32): ((64, 4), (32, 4), (64, 4), (32, 4), (32, 4), (16, 4), (32, 4)),
        (4, 64): ((32, 4), (16, 8), (64, 4), (16, 8), (16, 8), (16, 8), (16, 8)),
        (4, 128): ((16, 4), (16, 8), (64, 4), (16, 8), (16, 8), (16, 8), (16, 8)),
    },
    # Of `scan`: chunks per tile.
    'decay': {
        (2, 32): ((64, 4), (32, 4), (64, 4), (64, 4), (32, 4)),
        (2, 64): ((32, 4), (32, 4), (64, 4), (32, 4), (32, 4)),
        (2, 128): ((32, 8), (32, 4), (32, 8), (32, 8), (32, 8)),
        (4, 32): ((32, 4), (32, 4), (32, 4), (32, 4), (16, 4)),
        (4, 64): ((16, 4), (32, 4), (32, 4), (16, 4), (16, 4)),
        (4, 128): ((16, 8), (32, 4), (16, 8), (16, 8), (16, 8)),
    },
}
# One tile is loaded while another is worked on.
NUM_STAGES = 2
# Elements of a state that one program of `merge` takes.
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
    """Streaming multiprocessors (compute units) of a GPU; the interpreter plans for a large one."""
    cuda = device.type == 'cuda'
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else 132


def product_precision(dim: int, nvidia: bool) -> str:
    """Of fp32 matrix products. Three in tf32 are as exact as one in fp32, on the tensor cores.

    They keep two parts of each operand in shared memory: with D > 64 more than a GPU has.
    """
    return 'tf32x3' if nvidia and dim <= 64 else 'ieee'


def tile(op: str, phase: str, dtype: torch.dtype, dim: int) -> tuple[int, int]:
    """Tokens per tile, and warps."""
    return _TILES[op][dtype.itemsize, max(32, padded_dim(dim))][PHASES[op].index(phase)]


def chunk(dtype: torch.dtype, dim: int) -> int:
    """Tokens of `decay` that share a state, a multiple of every tile.

    A pass over the states takes at most as long as one over a token tensor and D / 32 more; tokens
    that share one meet each other, which takes time in proportion.
    """
    return max(64, 8 * padded_dim(dim) // dtype.itemsize)


def plan(
    op: str, phase: str, dtype: torch.dtype, dim: int, heads: int, tokens: int, processors: int
) -> Launch:
    """Parameters of one launch.

    Args:
        op, phase: Which kernel, from `PHASES`.
        dtype: Of the packed projection: float16, bfloat16 or float32.
        dim: Head dim D.
        heads: Images times heads, B * H.
        tokens: N, at least 1.
        processors: Streaming multiprocessors (compute units) of the GPU.
    """
    block, num_warps = tile(op, phase, dtype, dim)
    if op == 'decay':
        span = chunk(dtype, dim) if phase.startswith('state') else block
        splits = _ceil_div(tokens, span)
        return Launch(block, span, splits, heads * splits, num_warps)
    splits = min(PROGRAMS_PER_PROCESSOR * processors // heads, tokens // _shortest(op, phase, dim))
    tiles = _ceil_div(tokens, block)
    span = _ceil_div(tiles, max(1, splits)) * block
    splits = _ceil_div(tokens, span)
    return Launch(block, span, splits, heads * splits, num_warps)


def _shortest(op: str, phase: str, dim: int) -> int:
    """Fewest tokens for which one program pays."""
    if phase in _SUMMING[op]:
        # Each program writes a partial state, D + 1 rows of fp32, and it is read again.
        return 256 if dim <= 32 else 512 if dim <= 64 else 640
    # Each program reads the state, from L2.
    return 256


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
