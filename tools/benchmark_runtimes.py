"""Compare runtimes and precisions for a backbone, segmentor or detector on a CPU.

    python -m saga_mm benchmark_runtimes CONFIG --checkpoint FILE --size 512 512

The runtimes are PyTorch, AOTInductor, onnxruntime and OpenVINO (`pip install openvino`). Each is
measured in a process of its own, in float32 and in what else it offers: bfloat16, or int8, which
onnxruntime's dynamic quantisation uses in matrix products. The error is the largest one, relative
to the largest value of an output of PyTorch in float32. Memory is what the loaded program and its
first call add. With `--test`, the accuracy on the test data of the config is measured, too. The
tool writes runtimes.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

import torch

from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.files import write_text
from saga_mm.analysis.runtimes import RUNTIMES, TESTED, load, measure, prepare, table
from saga_mm.apis.export import AllBoxes, select
from saga_mm.checkpoint import make_folder, use_safe_loading
from saga_mm.cli import add_options, check_data, load_config, print_written, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of the model')
    parser.add_argument('--checkpoint', help='weights of the model. Defaults to untrained ones')
    parser.add_argument('--part', choices=['backbone', 'model'], default='backbone')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('H', 'W'),
        help='size of the image. Defaults to 512 512',
    )
    parser.add_argument(
        '--runtimes', nargs='+', choices=list(RUNTIMES), default=list(RUNTIMES), help='Default: all'
    )
    parser.add_argument(
        '--test',
        action='store_true',
        help="also test the model on the config's test data, whose images must have the size",
    )
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/runtimes'))
    add_options(parser, config=False)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if min(args.size) < 1:
        raise ValueError(f'--size must be two positive numbers, got {tuple(args.size)}')
    if 'openvino' in args.runtimes and importlib.util.find_spec('openvino') is None:
        raise ValueError('--runtimes openvino needs openvino: pip install openvino')
    use_safe_loading()
    if args.test:
        check_data(load_config(args.config, {}, TESTED), ('test',))
    make_folder(args.out_dir)
    model = load(args.config, args.checkpoint)
    module, outputs = select(model, args.part)
    if args.test and isinstance(module, AllBoxes):
        raise ValueError('--test of a detector needs --part backbone, got --part model')
    channels = getattr(model.backbone, 'input_channels', 3)
    images = torch.randn(1, channels, *args.size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        prepare(module, outputs, images, args.runtimes, Path(folder))
        common = dict(
            config=args.config,
            checkpoint=args.checkpoint,
            part=args.part,
            size=args.size,
            test=args.test,
            threads=torch.get_num_threads(),
            folder=folder,
        )
        cells = [
            dict(common, runtime=runtime, precision=precision)
            for runtime in args.runtimes
            for precision in RUNTIMES[runtime]
        ]
        results = run_cells(cells, measure, Path(folder, 'results.jsonl'))
    size = ' x '.join(map(str, args.size))
    text = (
        f'{args.part} of {Path(args.config).stem}, one image of {size} pixels, '
        f'{torch.get_num_threads()} threads, torch {torch.__version__}\n\n{table(results)}'
    )
    write_text(args.out_dir / 'runtimes.md', text)
    print(f'{text}\n')
    print_written(args.out_dir / 'runtimes.md')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
