"""Train models with the same schedule, and compare them by mean and range over seeds.

    python -m saga_mm compare_training CONFIG CONFIG --lr 5e-4 1e-3 2e-3 --seeds 0 1 2

The learning rate of each config is the best of those given, with the first seed. With that one, it
is trained for the other seeds as well. Options given by --cfg-options hold for all configs. The
result of a training is the metric of its last validation. If a config tests other data than it
validates, the table has the metric of that test as well, by which nothing is chosen.

Each training is a process of its own. With --jobs, several run side by side, which a GPU or many
cores need to be busy with small models; OMP_NUM_THREADS=1 gives each one thread. If the tool is
stopped, its trainings end, and the same command goes on from their last checkpoints, and repeats
nothing that is finished. After each training the tool writes trainings.md and trainings.jsonl to
the output folder. If one fails, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.files import write_text
from saga_mm.analysis.trainings import METRICS, best_rates, make_cell, measure, table
from saga_mm.apis.runs import TRAINING
from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_options, check_data, load_config, print_written, run_tool


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG')
    parser.add_argument(
        '--lr', nargs='+', type=float, help="learning rates to try. Defaults to each config's own"
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='Defaults to 0 1 2')
    parser.add_argument(
        '--metric', help=f'of the validation. Defaults to the first of {", ".join(METRICS)}'
    )
    parser.add_argument(
        '--lowest', action='store_true', help='the best value of the metric is the lowest one'
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='trainings that run side by side. Defaults to 1'
    )
    parser.add_argument('--out-dir', type=Path, default=Path('work_dirs/compare_training'))
    add_options(parser)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> list[Config]:
    """Load the configs; ValueError for options that do not fit."""
    names = [Path(path).stem for path in args.configs]
    if len(set(names)) < len(names):
        raise ValueError(f'configs must have different names, got {names}')
    for name, values in (('--seeds', args.seeds), ('--lr', args.lr or ())):
        if len(set(values)) < len(values) or any(value < 0 for value in values):
            raise ValueError(f'{name} must be different and not negative, got {values}')
    if args.jobs < 1:
        raise ValueError(f'--jobs must be positive, got {args.jobs}')
    needed = *TRAINING, 'val_dataloader', 'val_evaluator'
    configs = [load_config(path, args.cfg_options, needed) for path in args.configs]
    for path, cfg in zip(args.configs, configs, strict=True):
        if 'lr' not in cfg.optim_wrapper.get('optimizer', {}):
            raise ValueError(f'{path} must set optim_wrapper.optimizer.lr')
        check_data(cfg, ('train', 'val'))
    return configs


def run(args: argparse.Namespace) -> None:
    configs = prepare(args)
    first, *others = args.seeds
    make_folder(args.out_dir)

    def cell(cfg: Config, rate: float, seed: int) -> dict:
        folder = args.out_dir / Path(cfg.filename).stem
        return make_cell(cfg, folder, rate, seed, args.metric, args.cfg_options or {})

    rates = {cfg.filename: args.lr or [cfg.optim_wrapper.optimizer.lr] for cfg in configs}

    def run_all(cells: list[dict], earlier: Sequence[dict] = ()) -> list[dict]:
        def report(results: list[dict]) -> None:
            write_text(
                args.out_dir / 'trainings.md', '\n'.join(table([*earlier, *results], args.lowest))
            )

        log = args.out_dir / 'trainings.jsonl'
        return [*earlier, *run_cells(cells, measure, log, jobs=args.jobs, report=report)]

    results = run_all([cell(cfg, rate, first) for cfg in configs for rate in rates[cfg.filename]])
    best = best_rates(results, args.lowest)
    # The seeds take turns, so that an early stop leaves as many of each config.
    results = run_all(
        [
            cell(cfg, best[Path(cfg.filename).stem], seed)
            for seed, cfg in itertools.product(others, configs)
            if Path(cfg.filename).stem in best
        ],
        results,
    )
    print('\n'.join(table(results, args.lowest)), end='\n\n')
    folders = [args.out_dir / Path(cfg.filename).stem for cfg in configs]
    print_written(args.out_dir / 'trainings.md', args.out_dir / 'trainings.jsonl', *folders)
    if failed := [result for result in results if 'error' in result]:
        reason = f'{failed[0]["name"]}: {failed[0]["error"]}'
        raise ValueError(f'{len(failed)} of {len(results)} trainings failed: {reason}')


def main(argv: list[str] | None = None) -> None:
    run_tool(run, parse_args(argv))


if __name__ == '__main__':
    main()
