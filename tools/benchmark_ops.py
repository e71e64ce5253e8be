"""Time linear attention: the eager formula, torch.compile of it, this project, and others.

    python -m saga_mm benchmark_ops --out-dir work_dirs/benchmark_ops
    python -m saga_mm benchmark_ops --op rank_augmented    or another op
    python -m saga_mm benchmark_ops --tokens 3136 --shapes 1,1,32    on a CPU

Times are medians on random data. On a GPU, the L2 cache is flushed before each run. The share is
the number of bytes per time relative to that of a copy in the same run. Bytes are the fewest that
an op has to read and write, in token tensors T: gated 6 T forward and 11 T backward; rank-augmented
5 T and 9 T, as it reads q twice because of the mean of the queries; decay 6 T and 10 T, without the
states of its chunks; wkv 3 T and 5 T, where its kernels move 7 T and 13 T in half precision, since
they read their inputs twice and keep states of short tiles; depthwise 3 T and 7 T, layer_norm 2 T
and 3 T; ffn, with 8 times as many hidden channels, 2 T forward, without the weights, which each
program reads from a cache; gated_attention 5 T forward, likewise. The eager
layers leave out the gradients of weights, which the kernels compute. SDPA is softmax attention,
which is another function of the same tokens. The tool writes ops.json and ops.md, again after each
row.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

from saga_mm.analysis.files import write_text
from saga_mm.analysis.op_benchmark import ALTERNATIVES, OPS, benchmark, markdown
from saga_mm.apis import select_device
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, print_written, run_tool

TOKENS = (3136, 25600, 102400, 409600)
SHAPES = ((1, 1, 32), (1, 2, 64), (1, 8, 64), (2, 16, 64), (32, 8, 32))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument('--op', choices=OPS, default='gated')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default=default)
    parser.add_argument('--dtype', choices=('bfloat16', 'float16', 'float32'))
    parser.add_argument('--tokens', type=int, nargs='+', default=TOKENS, metavar='N')
    parser.add_argument('--shapes', type=shape_of, nargs='+', default=SHAPES, metavar='B,H,D')
    parser.add_argument('--seconds', type=float, default=0.1, help='per measurement')
    parser.add_argument(
        '--skip',
        nargs='+',
        default=(),
        choices=ALTERNATIVES,
        help='what to leave out; torch.compile takes most of the time',
    )
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/benchmark_ops'))
    add_options(parser, config=False)
    return parser.parse_args(argv)


def shape_of(text: str) -> tuple[int, int, int]:
    """The batch, heads and channels per head that an option such as 1,8,64 stands for."""
    if not re.fullmatch(r'[1-9]\d*(,[1-9]\d*){2}', text):
        raise argparse.ArgumentTypeError(f'expected B,H,D, such as 1,8,64, got {text!r}')
    batch, heads, dim = map(int, text.split(','))
    return batch, heads, dim


def run(args: argparse.Namespace) -> None:
    if min(args.tokens) < 1:
        raise ValueError(f'--tokens must be positive, got {min(args.tokens)}')
    select_device(args.device)
    dtype = args.dtype or ('bfloat16' if args.device == 'cuda' else 'float32')
    make_folder(args.out_dir)
    numbers, tables = args.out_dir / 'ops.json', args.out_dir / 'ops.md'

    def save(report: dict) -> None:
        write_text(numbers, json.dumps(report, indent=1))
        write_text(tables, markdown(report))

    report = benchmark(
        args.op, args.device, dtype, args.tokens, args.shapes, args.seconds, args.skip, save
    )
    print(f'{markdown(report)}\n')
    print_written(numbers, tables)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
