"""Trains and tests the model of a config, with the checks and hooks of this project."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import pickle
import sys
from collections.abc import Collection, Mapping
from numbers import Real
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor
from mmengine.registry import (
    HOOKS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    RUNNERS,
)
from mmengine.runner import Runner
from torch import nn

from ..checkpoint import CheckpointError, latest_checkpoint, make_folder, write_atomically
from ..cli import check_data, keep_freed_memory, prepare
from ..cli.launch import is_first_process, refuse_empty, use_cpu_processes
from ..cli.lock import locked
from ..cli.run_config import RunConfig
from ..cli.suggest import suggest_type
from ..cli.types import find_datasets, resolve
from ..engine import (
    AtomicCheckpointHook,
    CheckpointCheckHook,
    DataCheckHook,
    ExactResumeHook,
    FiniteCheckHook,
    MoveDrawingsHook,
    ProgressHook,
    ResumeScheduleHook,
)
from .load import TRAINING_ONLY

TRAINING = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
TESTING = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
# options of a dataloader that torch refuses without workers
OF_WORKERS = ('multiprocessing_context', 'persistent_workers', 'prefetch_factor', 'timeout')


def train(
    config: str | os.PathLike,
    *,
    work_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
    resume: str | os.PathLike | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: str = 'none',
    quiet: bool = False,
) -> nn.Module:
    """Train the model of a config.

    Args:
        config: The file.
        work_dir: Folder of logs and checkpoints. Defaults to that of the config, else to
            `work_dirs/<name of the config>`.
        options: Entries of the config to change, by dotted names, such as
            `{'train_cfg.max_iters': 100}`. Defaults to none.
        resume: A checkpoint to go on from; 'latest', for the latest one of the work dir; or 'auto',
            for that one if there is one, and else a new training. Defaults to None, for a new
            training.
        amp: Mixed precision, on a GPU.
        auto_scale_lr: Scale the learning rate with the batch size.
        launcher: How the processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.
        quiet: Print warnings and the progress only. The log file has everything.

    Returns:
        The trained model.

    Raises:
        OSError: A file or folder is missing, or can't be written.
        ValueError: The config or an option does not fit, another training uses the work dir, or the
            gradients become NaN.
    """
    cfg = prepare(config, TRAINING, options=options, work_dir=work_dir, launcher=launcher)
    _set_precision(cfg, amp)
    if auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    _check_lengths(cfg)
    _check_optimizer(cfg)
    run = RunConfig(cfg)
    run.launcher = launcher
    checkpoint = _checkpoint_to_resume(resume, cfg.work_dir)
    if checkpoint:
        run.resume = True
        run.load_from = checkpoint
    check_data(cfg, ('train', 'val'))
    make_folder(cfg.work_dir)
    if not is_first_process(launcher):
        return _build_training(run, quiet).train()
    with locked(cfg.work_dir):
        return _build_training(run, quiet).train()


def test(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    *,
    work_dir: str | os.PathLike | None = None,
    options: Mapping[str, object] | None = None,
    out: str | os.PathLike | None = None,
    show: bool = False,
    show_dir: str | os.PathLike | None = None,
    wait_time: float = 2,
    tta: bool = False,
    launcher: str = 'none',
    quiet: bool = False,
) -> dict[str, float]:
    """Evaluate the model of a config.

    Args:
        config: The file.
        checkpoint: Its weights, a file or a URL.
        work_dir: Folder of logs. Defaults as in `train`.
        options: As in `train`.
        out: A .pkl file for the predictions. Defaults to none.
        show: Show each prediction in a window.
        show_dir: A folder for drawings of the predictions. Defaults to none.
        wait_time: Seconds that a window stays. Defaults to 2.
        tta: Augment the images, and merge the predictions.
        launcher: As in `train`.
        quiet: As in `train`.

    Returns:
        The metrics by name.

    Raises:
        OSError: A file or folder is missing, or can't be written.
        ValueError: The config, the checkpoint or an option does not fit.
    """
    for name, value in {'checkpoint': checkpoint, '--out': out, '--show-dir': show_dir}.items():
        refuse_empty(name, value)
    if out is not None and not str(out).endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end in .pkl or .pickle, got {out}')
    cfg = prepare(config, TESTING, options=options, work_dir=work_dir, launcher=launcher)
    run = RunConfig(cfg)
    run.launcher = launcher
    run.load_from = str(checkpoint)
    run.resume = False
    if show or show_dir is not None:
        _draw_predictions(run, show, wait_time)
    if tta:
        _augment_tests(run)
    check_data(cfg, ['test'])
    if show_dir is None:
        return _run_test(run, out, quiet)
    with MoveDrawingsHook(show_dir) as drawings:
        _draw_to(run, drawings.source)
        return _run_test(run, out, quiet, drawings)


def _run_test(
    run: RunConfig,
    out: str | os.PathLike | None,
    quiet: bool,
    drawings: MoveDrawingsHook | None = None,
) -> dict[str, float]:
    make_folder(run.work_dir)
    if out is not None:
        make_folder(Path(out).parent)
    if get_device() == 'cpu':
        keep_freed_memory()
    runner = _build(run, quiet)
    _add_hook(runner, CheckpointCheckHook(complete=True, optional=TRAINING_ONLY))
    _add_hook(runner, DataCheckHook())
    if drawings is not None:
        _add_hook(runner, drawings)
    if out is not None:
        _save_predictions(runner, out)
    metrics = runner.test()
    for written in (out, drawings and drawings.folder):
        if written is not None:
            print_log(f'wrote {written}', 'current')
    return metrics


def _set_precision(cfg: Config, amp: bool) -> None:
    kind = resolve(cfg.optim_wrapper.get('type'), OPTIM_WRAPPERS, cfg.get('default_scope'))
    mixed = kind is not None and issubclass(kind, AmpOptimWrapper)
    if (amp or mixed) and get_device() == 'cpu':
        raise ValueError('mixed precision (--amp, AmpOptimWrapper) needs a GPU, and there is none')
    if amp:
        if not mixed:
            cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _check_lengths(cfg: Config) -> None:
    """ValueError for a training of no length, and for an interval that divides by zero."""
    for name in ('max_epochs', 'max_iters'):
        value = cfg.train_cfg.get(name)
        if isinstance(value, Real) and value <= 0:
            raise ValueError(f'train_cfg.{name} must be at least 1, got {value}')
    if cfg.get('val_cfg') is not None and cfg.train_cfg.get('val_interval') == 0:
        raise ValueError(
            'train_cfg.val_interval must be at least 1, got 0; without val_dataloader, val_cfg and '
            'val_evaluator there is no validation'
        )


def _check_optimizer(cfg: Config) -> None:
    """ValueError for an unknown optimizer, of which mmengine's constructor only says `None`."""
    optimizer = cfg.optim_wrapper.get('optimizer')
    kind = optimizer.get('type') if isinstance(optimizer, Mapping) else None
    scope = cfg.get('default_scope')
    constructor = cfg.optim_wrapper.get('constructor', DefaultOptimWrapperConstructor)
    builder = resolve(constructor, OPTIM_WRAPPER_CONSTRUCTORS, scope)
    if isinstance(kind, str) and builder and issubclass(builder, DefaultOptimWrapperConstructor):
        with OPTIMIZERS.switch_scope_and_registry(scope) as registry:
            if registry.get(kind) is None:
                near = suggest_type(kind, registry)
                raise ValueError(f'optim_wrapper.optimizer.type: there is no {kind!r}{near}')


def _checkpoint_to_resume(resume: str | os.PathLike | None, work_dir: str) -> str | None:
    if resume is None:
        return None
    refuse_empty('--resume', resume)
    if resume == 'auto':
        try:
            return latest_checkpoint(work_dir)
        except CheckpointError as error:
            # An earlier training leaves this file. Without it, weights of others may lie there.
            if Path(work_dir, 'last_checkpoint').exists():
                raise
            if any(Path(work_dir).glob('*.pth')):
                print_log(f'{error}; a new training begins')
            return None
    return latest_checkpoint(work_dir) if resume == 'latest' else str(resume)


def _build(run: RunConfig, quiet: bool) -> Runner:
    for split in ('train', 'val', 'test'):
        loader = run.get(f'{split}_dataloader')
        if isinstance(loader, dict) and not loader.get('num_workers'):
            for name in OF_WORKERS:
                loader.pop(name, None)
    if run.launcher == 'pytorch' and get_device() == 'cpu':
        use_cpu_processes(run)
    if not quiet:
        return RUNNERS.build(run)
    with contextlib.redirect_stdout(io.StringIO()):
        runner = RUNNERS.build(run)
    for handler in runner.logger.handlers:
        # of the console, not of the log file
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stdout)
            handler.setLevel(logging.WARNING)
    if is_first_process(run.launcher):
        _add_hook(runner, ProgressHook())
    return runner


def _build_training(run: RunConfig, quiet: bool) -> Runner:
    resume = bool(run.get('resume'))
    runner = _build(run, quiet)
    for i, hook in enumerate(runner.hooks):
        # its subclasses save as they do
        if type(hook) is CheckpointHook:
            runner.hooks[i] = _save_atomically(hook)
    _add_hook(runner, CheckpointCheckHook(complete=resume, resume=resume))
    _add_hook(runner, DataCheckHook())
    _add_hook(runner, ExactResumeHook())
    _add_hook(runner, ResumeScheduleHook())
    if not any(isinstance(hook, FiniteCheckHook) for hook in runner.hooks):
        _add_hook(runner, FiniteCheckHook())
    return runner


def _add_hook(runner: Runner, hook: Hook) -> None:
    """Register a hook; one of its class, as in configs that earlier versions saved, goes."""
    runner.hooks[:] = [other for other in runner.hooks if type(other) is not type(hook)]
    runner.register_hook(hook)


def _save_atomically(hook: CheckpointHook) -> CheckpointHook:
    if hook.file_client_args is not None:
        print_log('checkpoints are not written atomically: file_client_args is set', 'current')
        return hook
    return AtomicCheckpointHook.take_over(hook)


def _save_predictions(runner: Runner, out: str | os.PathLike) -> None:
    """Let a test write its predictions, in one piece when it is done."""
    model = getattr(runner.model, 'module', runner.model)
    metric = DumpResults(str(out))
    if any(base.__module__.startswith('mmdet.') for base in type(model).__mro__):
        from mmdet.evaluation import DumpDetResults

        # compresses masks
        metric = DumpDetResults(str(out))

    def write(results: list) -> dict:
        write_atomically(str(out), pickle.dumps(results))
        return {}

    metric.compute_metrics = write
    runner.test_evaluator.metrics.append(metric)


def _draw_predictions(run: RunConfig, show: bool, wait_time: float) -> None:
    hook = (run.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ValueError('--show-dir needs default_hooks.visualization in the config')
    hook.draw = True
    if 'interval' in _options(run, hook):
        hook.interval = 1
    if show:
        hook.update(show=True, wait_time=wait_time)


def _draw_to(run: RunConfig, folder: Path) -> None:
    hook = run.default_hooks.visualization
    if 'test_out_dir' in _options(run, hook):
        # relative to a folder of each run, unless absolute
        hook.test_out_dir = str(folder)
    elif run.get('visualizer') is None:
        raise ValueError('--show-dir needs a visualizer in the config')
    else:
        # mmengine takes a visualizer of the same name, and its folder, from an earlier run
        run.visualizer.update(save_dir=str(folder), name=folder.name)


def _options(run: RunConfig, hook: ConfigDict) -> Collection[str]:
    kind = resolve(hook.get('type'), HOOKS, run.get('default_scope'))
    return inspect.signature(kind).parameters if kind else ()


def _augment_tests(run: RunConfig) -> None:
    absent = [key for key in ('tta_model', 'tta_pipeline') if not run.get(key)]
    if absent:
        raise ValueError(f'--tta needs {" and ".join(absent)} in the config')
    for _, dataset in find_datasets(run.test_dataloader.dataset):
        dataset['pipeline'] = run.tta_pipeline
    run.model = dict(run.tta_model, module=run.model)
