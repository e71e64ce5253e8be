"""Processes, folders and options that training and testing set up alike."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..stack import check_stack
from .checkpoint import use_safe_loading

# what each launcher's processes have in their environment, and the program that puts it there
STARTED_BY = {
    'pytorch': ('RANK', 'torchrun'),
    'slurm': ('SLURM_PROCID', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}
# entries of a config that not the Runner's arguments but its methods read, or the tools
READ_ELSEWHERE = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'test_pipeline',
    'tta_model',
    'tta_pipeline',
)


def prepare(args: argparse.Namespace, needed: Sequence[str]) -> Config:
    """The config of a run, from the arguments of `add_common_arguments` and `config`.

    Checkpoints are loaded safely from here on.

    Args:
        args (argparse.Namespace): What the command line says.
        needed (Sequence[str]): Entries that the config must have.

    Raises:
        StackError: Two distributions have overwritten each other.
        OSError: There is no such config.
        ValueError: The config lacks an entry, an option changes one that nobody reads, or the
            processes can't work together as the launcher or the config wants it.
    """
    check_stack()
    use_safe_loading()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args.config, args.cfg_options, needed)
    cfg.launcher = args.launcher
    name = Path(args.config).stem
    cfg.work_dir = str(args.work_dir or cfg.get('work_dir') or Path('work_dirs', name))
    check_processes(cfg)
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        use_cpu_processes(cfg)
    return cfg


def load_config(path: str, options: Mapping[str, object], needed: Sequence[str]) -> Config:
    """A config with the `--cfg-options` in it; the errors are those of `prepare`."""
    try:
        cfg = Config.fromfile(path)
    except SyntaxError as error:
        where = error.filename if os.path.exists(error.filename or '') else path
        raise ValueError(f'{where} is no Python: {error.msg} (line {error.lineno})') from error
    read = {*cfg, *inspect.signature(Runner.__init__).parameters, *READ_ELSEWHERE}
    for key in options:
        if key.partition('.')[0] not in read:
            raise ValueError(f'--cfg-options: {path} has no entry {key.partition(".")[0]!r}')
    try:
        cfg.merge_from_dict(dict(options))
    except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in options.items())
        raise ValueError(f'--cfg-options: {given} does not fit {path}: {error}') from error
    for key in needed:
        if not cfg.get(key):
            raise ValueError(f'{path} must have an entry {key!r}, got {cfg.get(key)!r}')
    if not isinstance(cfg.model, Mapping):
        raise ValueError(f'model in {path} must be a dict, got {cfg.model!r}')
    return cfg


def make_folder(path: str | Path) -> None:
    """Make a folder, unless there is one, and see that it can be written; OSError if not."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{folder} can not be written: name another folder')


def check_processes(cfg: Config) -> None:
    """ValueError if a launcher or strategy can't work: not started by it, or without its GPU."""
    if cfg.launcher == 'none':
        processes = int(os.environ.get('WORLD_SIZE', 1)) if 'RANK' in os.environ else 1
        if processes > 1:
            raise ValueError(
                f'--launcher is none, and torchrun has started {processes} processes, which would '
                'each work alone and write into one folder: add --launcher pytorch'
            )
    else:
        variable, program = STARTED_BY[cfg.launcher]
        if variable not in os.environ:
            raise ValueError(
                f'--launcher {cfg.launcher} is for processes that {program} starts, and {variable} '
                'is not set: start them with tools/dist_train.sh or tools/slurm_train.sh, or leave '
                '--launcher out'
            )
    strategy = (cfg.get('strategy') or {}).get('type')
    if strategy and cfg.get('runner_type') != 'FlexibleRunner':
        raise ValueError(
            f"strategy {strategy} needs runner_type='FlexibleRunner' in the config, got "
            f'{cfg.get("runner_type")!r}'
        )
    if get_device() != 'cpu':
        return
    if cfg.launcher in ('slurm', 'mpi'):
        raise ValueError(
            f'--launcher {cfg.launcher} needs a GPU, and there is none: torchrun with --launcher '
            'pytorch starts processes without GPUs'
        )
    if strategy not in (None, 'SingleDeviceStrategy'):
        raise ValueError(
            f'strategy {strategy} of mmengine needs a GPU, and there is none: leave it out, or see '
            "docs/distributed.md for sharding by torch's fully_shard"
        )


def use_cpu_processes(cfg: Config) -> None:
    """Let several processes without a GPU work together, which mmengine's launcher can't.

    It asks for a CUDA device even with gloo; so the process group is made here. SyncBN needs a GPU:
    such layers become BN.
    """
    torch.distributed.init_process_group('gloo')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        broadcast_buffers=False,
    )
    if _replace_sync_bn(cfg.model) and is_main_process():
        print_log('SyncBN needs a GPU: each process normalises its own batch', 'current')


def _replace_sync_bn(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any([_replace_sync_bn(item) for item in value])
    if not isinstance(value, dict):
        return False
    found = value.get('type') == 'SyncBN'
    if found:
        value['type'] = 'BN'
    return any([found, *[_replace_sync_bn(item) for item in value.values()]])
