"""Processes, folders and options that training and testing set up alike."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log

from ..stack import check_stack
from .checkpoint import use_safe_loading


def prepare(args: argparse.Namespace) -> Config:
    """The config of a run, from the arguments of `add_common_arguments` and `config`.

    Checkpoints are loaded safely from here on, and the work dir exists.

    Raises:
        StackError: Two distributions have overwritten each other.
        OSError: There is no such config, or the work dir can't be written.
    """
    check_stack()
    use_safe_loading()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    name = Path(args.config).stem
    cfg.work_dir = str(args.work_dir or cfg.get('work_dir') or Path('work_dirs', name))
    if args.launcher == 'pytorch' and get_device() == 'cpu':
        use_cpu_processes(cfg)
    return cfg


def make_folder(path: str | Path) -> None:
    """Make a folder, unless there is one, and see that it can be written; OSError if not."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{folder} can not be written: name another folder')


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
    if _replace_sync_bn(cfg.model):
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
