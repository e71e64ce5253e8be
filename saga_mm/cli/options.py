"""Options that the command-line tools share, and the config that they change."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.runner import Runner

from .suggest import suggest, suggest_option

# entries that are read from a config although they are no arguments of the Runner
READ_ELSEWHERE = (
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'init_weights_for_test_or_val',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'test_pipeline',
    'tta_model',
    'tta_pipeline',
)
# what a config file may raise, which is a program, when it is run or can't be read
CONFIG_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ConfigOptions(DictAction):
    """`--cfg-options KEY=VALUE ...` as a dict; ends the program on anything else."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string}: expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def add_options(parser: argparse.ArgumentParser, config: bool = True) -> None:
    """Add the options that all tools have.

    Args:
        parser (argparse.ArgumentParser): The options `--debug` and, for `load_config`,
            `--cfg-options` are added to it.
        config (bool): Whether the tool takes a config. Defaults to True.
    """
    error = parser.error
    # an error about an unknown option names the nearest one
    vars(parser)['error'] = lambda message: error(message + suggest_option(parser, message))
    if config:
        parser.add_argument(
            '--cfg-options',
            nargs='+',
            action=ConfigOptions,
            default={},
            metavar='KEY=VALUE',
            help='config entries to change, such as model.backbone.drop_path_rate=0.2',
        )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


def byte_size(text: str) -> int:
    """The bytes of a size such as 4GiB, 800MB or 2e9, for `type` of an argument."""
    match = re.fullmatch(r'\s*(\d+(?:\.\d*)?(?:e\d)?)\s*(?:([kmgt])(i?))?b?\s*', text.lower())
    size = 0
    if match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** ' kmgt'.index(match[2] or ' '))
    if size < 1:
        raise argparse.ArgumentTypeError(f'expected a size such as 4GiB or 800MB, got {text!r}')
    return size


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, and those of all tools."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how processes are started. Defaults to none',
    )
    # some launchers pass this option
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    add_options(parser)


def load_config(path: str | Path, options: Mapping[str, object], needed: Sequence[str]) -> Config:
    """Read a config, and change it as `--cfg-options` says.

    Args:
        path (str | Path): The file, or such as `saga_mm::segmentation/upernet_saga_t.py` for one
            that comes with a package.
        options (Mapping[str, object]): Values by dotted keys, as `ConfigOptions` makes them.
        needed (Sequence[str]): Entries that the config must have.

    Raises:
        OSError: There is no such file.
        ValueError: The file, or one that it is based on, is not a config; an entry of `needed` is
            missing; or an option changes an entry that is never read.
    """
    try:
        cfg = Config.fromfile(_find(str(path)))
    except SyntaxError as error:
        where = f'{_file_behind(error, path)} is no Python'
        raise ValueError(f'{where}: {error.msg} (line {error.lineno})') from error
    except CONFIG_ERRORS as error:
        where = f'{_file_behind(error, path)} can not be read as a config'
        # mmengine appends the whole search path to a failed import
        reason = str(error).partition(', the current sys.path is')[0]
        raise ValueError(f'{where}: {type(error).__name__}: {reason}') from error
    read = {*inspect.signature(Runner.__init__).parameters, *READ_ELSEWHERE}
    for key in options:
        entry = key.partition('.')[0]
        if entry in cfg.keys() - read:
            print_log(
                f'--cfg-options: {key} changes a variable of {path}, and no entry that was made '
                'from it',
                level=logging.WARNING,
            )
        elif entry not in read:
            near = suggest(entry, {*cfg, *read})
            raise ValueError(f'--cfg-options: {path} has no entry {entry!r}{near}')
    try:
        cfg.merge_from_dict(dict(options))
    except (AssertionError, KeyError, IndexError, TypeError, ValueError) as error:
        given = ', '.join(f'{key}={value!r}' for key, value in options.items())
        raise ValueError(f'--cfg-options: {given} does not fit {path}: {error}') from error
    for key in needed:
        if cfg.get(key) is None:
            raise ValueError(f'{path} must have an entry {key!r}, got {cfg.get(key)!r}')
    if not isinstance(cfg.get('model', {}), Mapping):
        raise ValueError(f'model in {path} must be a dict, got {cfg.model!r}')
    return cfg


def _find(path: str) -> str:
    if '::' not in path:
        return path
    file = Path(Config._get_cfg_path(path, '')[0])
    if not file.is_file():
        near = suggest(file.name, (other.name for other in file.parent.glob('*.py')))
        raise FileNotFoundError(f'there is no config {path}{near}')
    return str(file)


def _file_behind(error: Exception, path: str | Path) -> str | Path:
    """The file that mmengine was reading when an error was raised: the last in a chain of bases."""
    names = [frame.f_locals.get('filename') for frame, _ in walk_tb(error.__traceback__)]
    return [path, *(name for name in names if isinstance(name, str) and os.path.isfile(name))][-1]
