"""Trains and tests the model of a config, with the checks and hooks of this project."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from torch import nn

from ..checkpoint import latest_checkpoint, make_folder
from ..cli import check_data, keep_freed_memory, prepare

TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
TESTING = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')


def train(
    config: str | os.PathLike,
    *,
    work_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: str = 'none',
) -> nn.Module:
    """Train the model of a config.

    Args:
        config: The file.
        work_dir: Folder of logs and checkpoints. Defaults to that of the config, else to
            `work_dirs/<name of the config>`.
        options: Entries of the config to change, by dotted names, such as
            `{'train_cfg.max_iters': 100}`. Defaults to none.
        resume: A checkpoint to go on from, or 'latest': the latest one of the work dir. Defaults to
            None, for a new training.
        amp: Mixed precision, on a GPU.
        auto_scale_lr: Scale the learning rate with the batch size.
        launcher: How the processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.

    Returns:
        The trained model.

    Raises:
        OSError: A file or folder is missing, or can't be written.
        ValueError: The config or an option does not fit.
    """
    cfg = prepare(config, TRAINING, options=options, work_dir=work_dir, launcher=launcher)
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise ValueError('mixed precision (--amp, AmpOptimWrapper) needs a GPU, and there is none')
    if auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if resume:
        cfg.resume = True
        cfg.load_from = latest_checkpoint(cfg.work_dir) if resume == 'latest' else resume
    save_atomically(cfg)
    complete = bool(cfg.get('resume'))
    cfg.custom_hooks = [
        *cfg.get('custom_hooks', []),
        dict(type='saga_mm.CheckpointCheckHook', complete=complete, resume=complete),
        dict(type='saga_mm.DataCheckHook'),
        dict(type='saga_mm.ExactResumeHook'),
    ]
    check_data(cfg, ('train', 'val'))
    make_folder(cfg.work_dir)
    return RUNNERS.build(cfg).train()


def test(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    work_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
    out: str | os.PathLike | None = None,
    show_dir: str | os.PathLike | None = None,
    tta: bool = False,
    launcher: str = 'none',
) -> dict[str, float]:
    """Evaluate the model of a config.

    Args:
        config: The file.
        checkpoint: Its weights, a file or a URL.
        work_dir: Folder of logs. Defaults as in `train`.
        options: As in `train`.
        out: A .pkl file for the predictions. Defaults to none.
        show_dir: A folder for drawings of the predictions. Defaults to none.
        tta: Augment the images, and merge the predictions.
        launcher: As in `train`.

    Returns:
        The metrics by name.

    Raises:
        OSError: A file or folder is missing, or can't be written.
        ValueError: The config, the checkpoint or an option does not fit.
    """
    cfg = prepare(config, TESTING, options=options, work_dir=work_dir, launcher=launcher)
    cfg.load_from = str(checkpoint)
    cfg.resume = False
    if out:
        dump_predictions(cfg, str(out))
    if show_dir:
        draw_predictions(cfg, Path(show_dir))
    if tta:
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


def save_atomically(cfg: Config) -> None:
    """Put the project's checkpoint hook in the place of mmengine's, also in configs of others."""
    hook = cfg.get('default_hooks', {}).get('checkpoint', dict(type='CheckpointHook', interval=1))
    if hook and hook['type'] == 'CheckpointHook':
        hook = dict(hook, type='saga_mm.AtomicCheckpointHook')
        cfg.merge_from_dict({'default_hooks.checkpoint': hook})


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
