"""Processes that training and testing set up alike."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from ..checkpoint import use_safe_loading
from ..stack import check_stack
from .options import load_config
from .types import name_of, resolve

# what each launcher's processes have in their environment, and the program that puts it there
STARTED_BY = {
    'pytorch': ('RANK', 'torchrun'),
    'slurm': ('SLURM_PROCID', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'mpirun'),
}


def prepare(
    config: str | os.PathLike,
    needed: Sequence[str],
    *,
    options: Mapping[str, object] | None = None,
    work_dir: str | os.PathLike | None = None,
    launcher: str = 'none',
) -> Config:
    """The config of a run, once it is known that its processes can work together.

    Checkpoints are loaded safely from here on.

    Args:
        config: The file.
        needed: Entries that the config must have.
        options: Entries to change, by dotted names. Defaults to none.
        work_dir: Folder of the run. Defaults to that of the config, else to
            `work_dirs/<name of the config>`.
        launcher: How the processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        StackError: Two distributions have overwritten each other.
        OSError: There is no such config.
        ValueError: The config lacks an entry, an option changes one that nobody reads, or the
            processes can't work together as the launcher or the config wants it.
    """
    check_stack()
    use_safe_loading()
    cfg = load_config(str(config), options or {}, needed)
    for name, value in {'--work-dir': work_dir, 'load_from': cfg.get('load_from')}.items():
        refuse_empty(name, value)
    cfg.work_dir = str(work_dir or cfg.get('work_dir') or Path('work_dirs', Path(config).stem))
    check_processes(cfg, launcher)
    return cfg


def refuse_empty(name: str, value: object) -> None:
    """ValueError if an option is an empty text, as that of a shell variable which is not set."""
    if value is not None and not str(value):
        raise ValueError(f"{name} must not be empty, got '': is a variable unset?")


def is_first_process(launcher: str) -> bool:
    """Whether this is the process that writes files, before the processes know each other."""
    return launcher == 'none' or os.environ.get(STARTED_BY[launcher][0]) == '0'


def check_processes(cfg: Config, launcher: str) -> None:
    """ValueError if a launcher or strategy can't work: not started by it, or without its GPU."""
    if launcher not in ('none', *STARTED_BY):
        raise ValueError(f'launcher must be one of none, {", ".join(STARTED_BY)}, got {launcher!r}')
    if launcher == 'none':
        processes = int(os.environ.get('WORLD_SIZE', 1)) if 'RANK' in os.environ else 1
        if processes > 1:
            raise ValueError(
                f'--launcher is none, and torchrun has started {processes} processes, which would '
                'each work alone and write into one folder: add --launcher pytorch'
            )
    else:
        variable, program = STARTED_BY[launcher]
        if variable not in os.environ:
            raise ValueError(
                f'--launcher {launcher} is for processes that {program} starts, and {variable} '
                'is not set: for one process leave --launcher out, and start several by '
                '`torchrun --nproc-per-node N -m saga_mm train CONFIG --launcher pytorch`'
            )
    strategy = (cfg.get('strategy') or {}).get('type')
    runner = resolve(cfg.get('runner_type'), RUNNERS, cfg.get('default_scope')) or Runner
    if strategy and not issubclass(runner, FlexibleRunner):
        raise ValueError(
            f"strategy {name_of(strategy)} needs runner_type='FlexibleRunner' in the config, got "
            f'{cfg.get("runner_type")!r}'
        )
    if get_device() != 'cpu':
        return
    if launcher in ('slurm', 'mpi'):
        raise ValueError(
            f'--launcher {launcher} needs a GPU, and there is none: torchrun with --launcher '
            'pytorch starts processes without GPUs'
        )
    if strategy and name_of(strategy).rpartition('.')[2] != 'SingleDeviceStrategy':
        raise ValueError(
            f'strategy {name_of(strategy)} of mmengine needs a GPU, and there is none: leave it '
            "out, or shard the model by torch's fully_shard, which works on CPUs"
        )


def use_cpu_processes(cfg: Config) -> None:
    """Let several processes without a GPU work together, which mmengine's launcher can't.

    It asks for a CUDA device even with gloo; so the process group is made here.
    """
    torch.distributed.init_process_group('gloo')
    atexit.register(_end_cpu_processes)
    options = cfg.get('model_wrapper_cfg') or {}
    unused = cfg.get('find_unused_parameters', False)
    kind = 'CPUDistributedDataParallel'
    cfg.model_wrapper_cfg = {'find_unused_parameters': unused, **options, 'type': kind}


def _end_cpu_processes() -> None:
    """End the threads of gloo before Python ends.

    A thread that lets go of a tensor of Python later than that aborts the process. The group ends
    its threads when nothing refers to it any more, as the model does until it is collected.
    """
    torch.distributed.destroy_process_group()
    gc.collect()


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper without a GPU, which SyncBN would need: such layers become batch norm."""

    def __init__(self, module: nn.Module, device_ids: object = None, **options) -> None:
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules()):
            print_log('SyncBN needs a GPU: each process normalises its own batch', 'current')
            module = revert_sync_batchnorm(module)
        super().__init__(module, **{'broadcast_buffers': False, **options})
