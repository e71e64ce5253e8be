"""Options that the command-line tools share, and the config that they change."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Mapping, Sequence

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

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


class ConfigOptions(DictAction):
    """`--cfg-options KEY=VALUE ...` as a dict; ends the program on anything else."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string}: expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that training and testing share."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        default={},
        metavar='KEY=VALUE',
        help='config entries to change, such as train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how processes are started. Defaults to none',
    )
    # some launchers pass it
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


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
