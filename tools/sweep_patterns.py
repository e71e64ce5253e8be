"""Compare placements of softmax layers in SoLA-Vision: cost and, with --train, accuracy.

    python tools/sweep_patterns.py CONFIG --patterns linear every_3rd LL/LL/LLLLLS/LL
    python tools/sweep_patterns.py CONFIG --linear gated plain decay --train 150

A pattern is a preset of `layers`, or four strings of L and S with slashes between them. Parameters,
multiply-adds (which papers call FLOPs; those of attention are counted), time and memory are the
backbone's, for one forward pass; mIoU is the whole model's, after training. Each cell has processes
of its own: one that fails costs its row, which says why. Time is a median over rounds in which the
cells take turns. Memory on a GPU is the peak that torch allocated, on a CPU that of the process,
libraries included.

Writes patterns.md, patterns.png and cells.jsonl to the output folder. The last keeps what is
finished: a second run with the same settings does the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from infer import pick_device
from matplotlib.figure import Figure
from mmengine.config import Config
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saga_mm.backbones.sola_vision import LINEAR, PRESETS, SoLAVision, resolve_layers
from saga_mm.engine.cli import ConfigOptions, command_line
from saga_mm.engine.data import check_data
from saga_mm.engine.launch import make_folder
from saga_mm.registry import MODELS

TRAIN = Path(__file__).with_name('train.py')
DTYPES = ('float32', 'bfloat16', 'float16')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config of a model on saga_mm.SoLAVision')
    parser.add_argument(
        '--patterns',
        nargs='+',
        default=list(PRESETS),
        metavar='PATTERN',
        help=f'of {", ".join(PRESETS)}, or such as LL/LL/LLLLLS/LL. Defaults to all presets',
    )
    parser.add_argument(
        '--linear', nargs='+', choices=list(LINEAR), help="Defaults to the config's own"
    )
    parser.add_argument('--train', type=int, metavar='ITERS', help='also train, for so long')
    parser.add_argument('--out-dir', type=Path, help='Defaults to work_dirs/sweep_<config>')
    parser.add_argument('--device', help='such as cpu or cuda:1. Defaults to cuda, else cpu')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help="Defaults to the config's crops"
    )
    parser.add_argument('--batch', type=int, default=1, help='Defaults to 1')
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='half precision by autocast'
    )
    parser.add_argument('--repeats', type=int, default=5, help='rounds of timing. Defaults to 5')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help='config entries to change',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


class CellError(RuntimeError):
    """The process of a cell has ended without a result. The message is one line."""


class Cell:
    """One row: a pattern and a kind of linear layer in the config of a model."""

    def __init__(self, pattern: str, linear: str, cfg: Config) -> None:
        self.pattern, self.linear = pattern, linear
        self.name = f'{linear}_{pattern.replace("/", "-")}'
        self.backbone = dict(
            cfg.model.backbone,
            type='saga_mm.SoLAVision',
            layers=pattern if pattern in PRESETS else pattern.split('/'),
            linear=linear,
        )
        arch = self.backbone.get('arch', 'tiny')
        self.layers = resolve_layers(arch, self.backbone['layers'], SoLAVision.arch_settings)[1]
        self.results: dict = {}
        self.error: str | None = None

    def training(self, cfg: Config, iterations: int) -> Config:
        cfg = Config(cfg.to_dict())
        cfg.model.backbone = self.backbone
        cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
        return cfg


class Records:
    """Results that outlive the process, one JSON line each, by everything they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                # a run was killed while it wrote
                continue
            self.known[self._key(record['settings'])] = record['results']

    def get(self, settings: dict) -> dict | None:
        return self.known.get(self._key(settings))

    def add(self, settings: dict, results: dict) -> None:
        with self.path.open('a') as file:
            file.write(json.dumps(dict(settings=settings, results=results)) + '\n')

    @staticmethod
    def _key(settings: dict) -> str:
        return json.dumps(settings, sort_keys=True)


class Worker:
    """A process with the model of one cell, which answers each request with a line of JSON."""

    def __init__(self, cell: Cell, args: argparse.Namespace) -> None:
        options = dict(backbone=cell.backbone, **cost_settings(args))
        make_folder(args.out_dir / cell.name)
        self.log = args.out_dir / cell.name / 'cost.log'
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, '--worker', json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise CellError(reason(self.process.wait(), self.log.read_text()))
        return json.loads(line)

    def ask(self) -> dict:
        # a process that has ended is noticed where its answer is read
        with suppress(BrokenPipeError):
            self.process.stdin.write('\n')
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def reason(status: int, log: str) -> str:
    """Why a process failed, in one line, from its exit status and what it wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1].removeprefix('error: ') if lines else f'exit status {status}'
    if status < 0:
        last = f'killed by {signal.Signals(-status).name}'
        return f'{last}, perhaps out of memory' if status == -signal.SIGKILL else last
    if 'out of memory' in last.lower() or "can't allocate memory" in last:
        return 'out of memory'
    return textwrap.shorten(last, 160, placeholder=' ...')


def cost_settings(args: argparse.Namespace) -> dict:
    keys = ('size', 'batch', 'dtype', 'device', 'repeats')
    return {key: getattr(args, key) for key in keys}


def work(options: dict) -> None:
    """What a worker does: tells the model's size, then times a forward pass per line of input."""
    # whatever libraries print must not come between the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    device = torch.device(options['device'])
    dtype = getattr(torch, options['dtype'])
    x = torch.randn(options['batch'], 3, *options['size'])
    print(json.dumps(count(options['backbone'], x)), file=answers, flush=True)
    model = MODELS.build(options['backbone']).to(device).eval()
    x = x.to(device)
    for _ in sys.stdin:
        half = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
        with torch.inference_mode(), half:
            milliseconds = time_once(model, x)
        print(json.dumps(dict(ms=milliseconds, mib=peak_mib(device))), file=answers, flush=True)


def count(backbone: dict, x: torch.Tensor) -> dict:
    """Parameters, and multiply-adds of a forward pass, which is not computed.

    Linear attention is that of its reference; fused attention is taken apart, since the counter has
    no formula for the CPU's.
    """
    model = MODELS.build({**backbone, 'impl': 'reference'}).eval()
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as shapes_only,
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model(shapes_only.from_tensor(x))
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, multiply_adds=counter.get_total_flops() // 2)


def time_once(model: nn.Module, x: torch.Tensor) -> float:
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    model(x)
    synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start)
    if x.is_cuda:
        # other cells live on this GPU
        torch.cuda.empty_cache()
    return milliseconds


def peak_mib(device: torch.device) -> float:
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2**20
    # kibibytes, but bytes on macOS
    unit = 2**20 if sys.platform == 'darwin' else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(cells: list[Cell], args: argparse.Namespace, records: Records) -> None:
    """Fill in parameters, multiply-adds, time and memory."""
    settings = {
        cell: dict(part='cost', backbone=cell.backbone, **cost_settings(args)) for cell in cells
    }
    for cell in cells:
        cell.results.update(records.get(settings[cell]) or {})
    workers = {cell: Worker(cell, args) for cell in cells if not cell.results}
    times: dict[Cell, list[float]] = {cell: [] for cell in workers}
    try:
        for turn in range(-2, args.repeats):
            for cell in [cell for cell in workers if not cell.error]:
                try:
                    answer = workers[cell].answer() if turn == -2 else workers[cell].ask()
                except CellError as error:
                    cell.error = str(error)
                    continue
                cell.results.update(answer)
                if turn >= 0:
                    times[cell].append(answer['ms'])
    finally:
        for worker in workers.values():
            worker.close()
    for cell in workers:
        if cell.error:
            # what was known before it failed
            for name in ('ms', 'mib'):
                cell.results.pop(name, None)
        else:
            cell.results['ms'] = statistics.median(times[cell])
            records.add(settings[cell], cell.results)
        print(f'{cell.name}: {cell.error or json.dumps(cell.results)}', flush=True)


def train(cell: Cell, cfg: Config, args: argparse.Namespace, records: Records) -> None:
    """Fill in the mIoU, by tools/train.py."""
    cfg = cell.training(cfg, args.train)
    digest = hashlib.sha256(cfg.pretty_text.encode()).hexdigest()
    settings = dict(part='accuracy', pattern=cell.pattern, linear=cell.linear, config=digest)
    if (known := records.get(settings)) is None:
        folder = args.out_dir / cell.name
        make_folder(folder)
        cfg.dump(folder / 'config.py')
        command = [sys.executable, TRAIN, folder / 'config.py', '--work-dir', folder]
        hidden = dict(CUDA_VISIBLE_DEVICES='') if args.device == 'cpu' else {}
        log = folder / 'train.log'
        with log.open('w') as file:
            status = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **hidden}
            ).returncode
        if status:
            raise CellError(reason(status, log.read_text()))
        known = dict(miou=last_miou(folder))
        records.add(settings, known)
        print(f'{cell.name}: mIoU {known["miou"]}', flush=True)
    cell.results.update(known)


def last_miou(folder: Path) -> float:
    """The mIoU of the newest run in a work dir."""
    scalars = sorted(folder.glob('*/vis_data/scalars.json'))
    rows = map(json.loads, scalars[-1].read_text().splitlines()) if scalars else ()
    found = [row['mIoU'] for row in rows if 'mIoU' in row]
    if not found:
        raise CellError('the training has not evaluated an mIoU')
    return found[-1]


def table(cells: list[Cell], args: argparse.Namespace) -> Iterator[str]:
    height, width = args.size
    where = torch.cuda.get_device_name(args.device) if args.device != 'cpu' else 'CPU'
    yield (
        f'{args.batch} x 3 x {height} x {width}, {args.dtype}, {where}, torch {torch.__version__}, '
        f'{torch.get_num_threads()} threads, medians of {args.repeats}'
    )
    yield ''
    accuracy = f' mIoU after {args.train} iterations |' if args.train else ''
    head = '| pattern | linear | layers | parameters | multiply-adds | ms | peak MiB |'
    yield f'{head}{accuracy} failed |'
    yield '|---|---|---|---|---|---|---|---|' + ('---|' if args.train else '')
    scales = dict(parameters=(1e6, '.2f', 'M'), multiply_adds=(1e9, '.2f', 'G'))
    scales |= dict(ms=(1, '.1f', ''), mib=(1, '.0f', ''))
    scales |= dict(miou=(1, '.2f', '')) if args.train else {}
    for cell in cells:
        shown = [
            f'{cell.results[name] / scale:{form}}{unit}' if name in cell.results else '-'
            for name, (scale, form, unit) in scales.items()
        ]
        failed = (cell.error or '').replace('|', '/')
        row = (cell.pattern, cell.linear, ' '.join(cell.layers), *shown, failed)
        yield f'| {" | ".join(row)} |'


def draw(cells: list[Cell], with_accuracy: bool, path: Path) -> None:
    """Accuracy, or without it time, against cost."""
    labels = dict(ms='ms', mib='peak MiB', multiply_adds='multiply-adds', miou='mIoU')
    pairs = [('ms', 'miou'), ('mib', 'miou')] if with_accuracy else [('multiply_adds', 'ms')]
    figure = Figure(figsize=(6 * len(pairs), 4.5), layout='constrained')
    for axes, (x, y) in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs, strict=True):
        for cell in cells:
            point = [cell.results.get(name) for name in (x, y)]
            if None in point:
                continue
            axes.plot(*point, 'o', color=f'C{list(LINEAR).index(cell.linear)}')
            text = f'{cell.pattern}, {cell.linear}'
            axes.annotate(
                text, point, xytext=(4, 4), textcoords='offset points', fontsize='x-small'
            )
        axes.set(xlabel=labels[x], ylabel=labels[y])
        axes.margins(0.15)
    figure.savefig(path, dpi=120)


def prepare(args: argparse.Namespace) -> tuple[Config, list[Cell]]:
    """The config and the cells; ValueError for options that can't be met."""
    for name in ('batch', 'repeats', 'train'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    kind = cfg.model.backbone.type
    if kind not in ('saga_mm.SoLAVision', 'SoLAVision'):
        raise ValueError(f'model.backbone.type must be saga_mm.SoLAVision, got {kind}')
    args.device = str(pick_device(args.device))
    args.size = list(args.size or cfg.model.data_preprocessor.get('size') or (512, 512))
    if min(args.size) < 1:
        raise ValueError(f'size must be positive, got {args.size}')
    args.out_dir = args.out_dir or Path('work_dirs', f'sweep_{Path(args.config).stem}')
    kinds = args.linear or [cfg.model.backbone.get('linear', 'gated')]
    pairs = dict.fromkeys(itertools.product(args.patterns, kinds))
    cells = [Cell(pattern, linear, cfg) for pattern, linear in pairs]
    if args.train:
        if cfg.train_cfg.get('type') != 'IterBasedTrainLoop':
            raise ValueError('--train needs a config that trains by iterations (segmentation)')
        check_data(cfg, ('train', 'val'))
    return cfg, cells


def run(args: argparse.Namespace) -> None:
    cfg, cells = prepare(args)
    make_folder(args.out_dir)
    records = Records(args.out_dir / 'cells.jsonl')
    measure(cells, args, records)
    for cell in cells if args.train else ():
        try:
            train(cell, cfg, args, records)
        except CellError as error:
            cell.error = '; '.join(filter(None, [cell.error, f'training: {error}']))
            print(f'{cell.name}: {cell.error}', flush=True)
    text = '\n'.join(table(cells, args)) + '\n'
    (args.out_dir / 'patterns.md').write_text(text)
    draw(cells, bool(args.train), args.out_dir / 'patterns.png')
    print(f'\n{text}\n{args.out_dir}/patterns.md, {args.out_dir}/patterns.png')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command_line(args.debug):
        run(args)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        work(json.loads(sys.argv[2]))
    else:
        main()
