"""Evaluate a detector or segmentor; tools/dist_test.sh does it on several GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS

from saga_mm.checkpoint import make_folder
from saga_mm.cli import add_common_arguments, check_data, command_line, keep_freed_memory, prepare

TESTING = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the model')
    parser.add_argument('checkpoint', help='its weights, a file or a URL')
    parser.add_argument('--out', help='.pkl file for the predictions')
    parser.add_argument('--show-dir', type=Path, help='folder for drawings of the predictions')
    parser.add_argument('--tta', action='store_true', help='augment the images, merge predictions')
    add_common_arguments(parser)
    return parser.parse_args(argv)


def dump_predictions(cfg: Config, out: str) -> None:
    if not out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end in .pkl or .pickle, got {out}')
    make_folder(Path(out).parent)
    # mmdet's compresses masks
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    evaluators = cfg.test_evaluator
    if not isinstance(evaluators, (list, tuple)):
        evaluators = [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=out)]


def draw_predictions(cfg: Config, folder: Path) -> None:
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError('--show-dir needs default_hooks.visualization in the config')
    make_folder(folder)
    hook.update(draw=True, interval=1)
    if hook.type == 'DetVisualizationHook':
        # relative to a folder of each run, unless absolute
        hook.test_out_dir = str(folder.resolve())
    else:
        cfg.visualizer.save_dir = str(folder)


def augment_tests(cfg: Config) -> None:
    absent = [key for key in ('tta_model', 'tta_pipeline') if key not in cfg]
    if absent:
        raise ValueError(f'--tta needs {" and ".join(absent)} in the config')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def run(args: argparse.Namespace) -> dict:
    cfg = prepare(args, TESTING)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.out:
        dump_predictions(cfg, args.out)
    if args.show_dir:
        draw_predictions(cfg, args.show_dir)
    if args.tta:
        augment_tests(cfg)
    cfg.custom_hooks = [
        *cfg.get('custom_hooks', []),
        dict(type='saga_mm.CheckpointCheckHook', complete=True),
        dict(type='saga_mm.DataCheckHook'),
    ]
    check_data(cfg, ['test'])
    make_folder(cfg.work_dir)
    if get_device() == 'cpu':
        keep_freed_memory()
    return RUNNERS.build(cfg).test()


def main(argv: list[str] | None = None) -> dict:
    """Evaluate; return the metrics."""
    args = parse_args(argv)
    with command_line(args.debug):
        return run(args)


if __name__ == '__main__':
    main()
