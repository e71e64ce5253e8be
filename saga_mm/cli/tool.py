"""Runs the work of a command-line tool."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from ..checkpoint import printable
from ..stack import check_stack
from .errors import command_line, describe

Result = TypeVar('Result')


def run_tool(run: Callable[[argparse.Namespace], Result], args: argparse.Namespace) -> Result:
    """Call `run(args)`; errors end the program with one line.

    Args:
        run: The work of the tool.
        args: Arguments, with the options of `add_options`. With `--debug`, errors keep their
            traceback.

    Returns:
        What `run` returns.
    """
    with command_line(args.debug):
        check_stack()
        # Python looks for modules in the folder of a script first, where `test.py` and the other
        # tools would hide the modules of these names.
        script = Path(sys.argv[0]).resolve()
        if script.is_file() and sys.path[0] == str(script.parent):
            sys.path.append(sys.path.pop(0))
        return run(args)


def print_written(*files: str | Path) -> None:
    """Print the names of all files that a tool wrote, and of folders that it filled."""
    print(f'wrote {", ".join(printable(str(file)) for file in files)}', flush=True)


class go_on:
    """Context for one of many items: an error is printed and recorded, and the work continues.

    Args:
        name (str): Name of the item.
        failed (dict[str, str]): An error is added to it, in one line, under the name.
        debug (bool): Raise the error instead, with its traceback.
    """

    def __init__(self, name: str, failed: dict[str, str], debug: bool) -> None:
        self.name = name
        self.failed = failed
        self.debug = debug

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception) or self.debug:
            return False
        reason = describe(error)
        print(f'failed: {reason}', flush=True)
        self.failed[self.name] = reason
        return True
