"""What the command-line tools share: options, and errors of one line."""

from __future__ import annotations

import argparse
import sys
import textwrap
from types import TracebackType

from mmengine.config import DictAction

from ..stack import StackError

# mistakes of the user; anything else may be a fault of the program
EXPECTED = (OSError, StackError, ValueError)


class command_line:
    """Context of a tool's work: an error ends the program with one line and exit status 1.

    Args:
        debug (bool): Let the error through, with its traceback.
    """

    def __init__(self, debug: bool) -> None:
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt) and not self.debug:
            print('interrupted', file=sys.stderr)
            sys.exit(130)
        if isinstance(error, Exception) and not self.debug:
            sys.exit(f'error: {describe(error)}')


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


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        message = ': '.join(str(part) for part in (error.strerror, error.filename) if part)
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])
    else:
        message = str(error)
    message = textwrap.shorten(message, 1000, placeholder=' ...')
    if isinstance(error, EXPECTED) and message:
        return message
    return f'{type(error).__name__}: {message} (run with --debug for the traceback)'
