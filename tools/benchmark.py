"""Compare backbones, or whole models, in speed and memory, at several image sizes.

    python -m saga_mm benchmark --models saga_t pvt_t pvt_t_sdpa --baseline pvt_t \
        --sizes 512 1024 --mode infer train --out work_dirs/benchmark

Each measurement is repeated in several rounds, in which the models take turns. On a CPU, each runs
in a new process. Time is the median over rounds; its spread is the range over rounds. Memory is the
peak that the work adds to the loaded model and the input. FLOPs are counted apart. They are those
of one image, two per multiply-add, in matrix products, convolutions and attention. With
`--mode parts`, the parts of whole models are measured apart. The tool writes benchmark.md,
benchmark.png and results.jsonl; from the last, an interrupted run continues.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from saga_mm.analysis.benchmark import (
    KNOWN,
    MODES,
    is_config,
    is_known,
    is_whole,
    make_cells,
    measure,
    plot,
    summarize,
    table,
)
from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.files import check_drawing, write_text
from saga_mm.analysis.measure import DTYPES
from saga_mm.analysis.whole_models import HEADS, table_of_parts
from saga_mm.apis import select_device
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, load_config, print_written, run_tool
from saga_mm.cli.suggest import suggest


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--models',
        nargs='+',
        default=['saga_t', 'pvt_t', 'pvt_t_sdpa'],
        help=f'{", ".join(KNOWN)}; HEAD+BACKBONE with one of them and {", ".join(HEADS)}; the name '
        'of a registered backbone, such as mmdet.ResNet; or the config file of a detector or '
        'segmentor',
    )
    parser.add_argument(
        '--baseline', help='the model that ratios refer to. Defaults to the first one'
    )
    parser.add_argument('--sizes', nargs='+', type=int, default=[512, 768, 1024, 1280])
    parser.add_argument(
        '--mode',
        nargs='+',
        choices=[*MODES, 'parts'],
        default=['infer'],
        help='graph: inference as a CUDA graph, without the time that Python takes; parts: '
        'backbone, neck, head and post-processing of whole models apart, in inference',
    )
    parser.add_argument('--dtype', nargs='+', choices=list(DTYPES), default=['fp32'])
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to a GPU if there is one')
    parser.add_argument(
        '--keep-memory',
        action='store_true',
        help='on a CPU: let processes keep the memory that they free, as `infer` does',
    )
    parser.add_argument(
        '--no-flops',
        action='store_true',
        help='do not count FLOPs, which takes a further run of each model',
    )
    parser.add_argument('--rounds', type=int, default=3, help='measurements of each cell')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'))
    add_options(parser, config=False)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    args.baseline = args.baseline or args.models[0]
    if args.baseline not in args.models:
        raise ValueError(f'--baseline must be one of {args.models}, got {args.baseline!r}')
    for name in ('batch_size', 'rounds'):
        if getattr(args, name) < 1:
            raise ValueError(
                f'--{name.replace("_", "-")} must be positive, got {getattr(args, name)}'
            )
    if min(args.sizes) < 32:
        raise ValueError(f'--sizes must be at least 32 pixels, got {min(args.sizes)}')
    if args.keep_memory and (args.device or 'cpu') != 'cpu':
        raise ValueError(f'--keep-memory is for --device cpu, got {args.device}')
    args.device = 'cpu' if args.keep_memory else str(select_device(args.device))
    if 'graph' in args.mode and torch.device(args.device).type != 'cuda':
        raise ValueError(f'--mode graph needs a GPU, got --device {args.device}')
    for name in args.models:
        if 'parts' in args.mode and not is_whole(name):
            raise ValueError(f'--mode parts needs configs or HEAD+BACKBONE, got {name!r}')
        if is_config(name):
            load_config(name, {}, ('model',))
        elif not is_known(name) and '.' not in name:
            heads = f' after a head of {tuple(HEADS)}' if '+' in name else ''
            near = suggest(name.rpartition('+')[2], KNOWN)
            known = f'{tuple(KNOWN)}{heads}, no config, no scope.Name'
            raise ValueError(f'--models: {name!r} is none of {known}{near}')


def describe_machine(args: argparse.Namespace) -> str:
    if torch.device(args.device).type == 'cuda':
        processor = torch.cuda.get_device_name(args.device)
    else:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
        processor = (
            f'{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads'
        )
    kept = ', freed memory kept' if args.keep_memory else ''
    return f'{processor}, torch {torch.__version__}, batch {args.batch_size}{kept}'


def run(args: argparse.Namespace) -> None:
    check_drawing()
    check(args)
    make_folder(args.out)
    text = describe_machine(args)
    files = [args.out / 'benchmark.md', args.out / 'results.jsonl']
    modes = [mode for mode in args.mode if mode != 'parts']
    if modes:
        rows = summarize(measure_all(args, modes, not args.no_flops), args.baseline)
        text += (
            f'; medians of {args.rounds} rounds, spread: their range.\n'
            f'Speed-up and memory ratio: against {Path(args.baseline).stem}.\n\n{table(rows)}'
        )
        if any('error' not in row for row in rows):
            files.append(args.out / 'benchmark.png')
            plot(rows, files[-1])
    if 'parts' in args.mode:
        parts = measure_all(args, ['parts'], flops=False)
        text += (
            f'\n\nParts of the models, in inference; medians of {args.rounds} rounds.\n\n'
            f'{table_of_parts(parts)}'
        )
    write_text(files[0], text)
    print(f'{text}\n')
    print_written(*files)


def measure_all(args: argparse.Namespace, modes: list[str], flops: bool) -> list[dict]:
    """Measure what is not in `results.jsonl` yet, and return all results."""
    cells = make_cells(
        args.models,
        modes,
        args.dtype,
        args.sizes,
        args.rounds,
        flops=flops,
        device=args.device,
        batch_size=args.batch_size,
        threads=torch.get_num_threads(),
        keep_memory=args.keep_memory,
    )
    # The peak of a process's memory tells nothing of its later measurements; that of a GPU's does.
    new_process = torch.device(args.device).type == 'cpu'
    return run_cells(cells, measure, args.out / 'results.jsonl', new_process)


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
