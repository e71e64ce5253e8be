"""Errors of the command-line tools, in one line."""

from __future__ import annotations

import logging
import sys
import textwrap
from traceback import walk_tb
from types import TracebackType

from mmengine.dataset import BaseDataset

from ..engine.data_check import describe_empty
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
        # a log that can't be written, as on a full disk, is no reason for a traceback of its own
        self.raises, logging.raiseExceptions = logging.raiseExceptions, self.debug

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        logging.raiseExceptions = self.raises
        if isinstance(error, KeyboardInterrupt) and not self.debug:
            print('interrupted', file=sys.stderr)
            sys.exit(130)
        if isinstance(error, Exception) and not self.debug:
            sys.exit(f'error: {describe(error)}')


def describe(error: Exception) -> str:
    """An error in one line, with the file that it came from if it came from data."""
    file, empty = _data(error.__traceback__)
    if empty is not None:
        return describe_empty(empty)
    if isinstance(error, OSError) and error.strerror:
        message = ': '.join(str(part) for part in (error.strerror, error.filename) if part)
    elif isinstance(error, KeyError) and error.args:
        message = str(error.args[0])
    else:
        message = str(error)
    in_worker = message.startswith('Caught ') and 'in DataLoader worker process' in message
    if in_worker:
        # below the traceback of the other process
        message = message.rstrip().rpartition('\n')[2]
        file = 'data in a worker; with num_workers=0 the file is named'
    if 'gloo/transport' in message:
        return (
            'the connection to another process of this run is lost: that one has ended, see its '
            'own error'
        )
    message = textwrap.shorten(message, 1000, placeholder=' ...')
    if file:
        message = f'{message} (while reading {file})'
    if isinstance(error, EXPECTED) and message:
        return message
    kind = '' if in_worker else f'{type(error).__name__}: '
    return f'{kind}{message} (run with --debug for the traceback)'


def _data(traceback: TracebackType | None) -> tuple[str | None, BaseDataset | None]:
    """The file that was being read when an error came, and the data set if it is empty."""
    file = None
    for frame, _ in walk_tb(traceback):
        name, variables = frame.f_code.co_name, frame.f_locals
        results, dataset = variables.get('results'), variables.get('self')
        # mmengine fails to store an empty list
        if name == '_serialize_data' and isinstance(dataset, BaseDataset) and not dataset.data_list:
            return None, dataset
        if name == 'transform' and isinstance(results, dict):
            paths = (results.get(key) for key in ('img_path', 'seg_map_path'))
            file = ' and '.join(str(path) for path in paths if path) or file
        # pycocotools'
        elif isinstance(variables.get('annotation_file'), str):
            file = variables['annotation_file']
    return file, None
