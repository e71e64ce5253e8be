"""Runs the work of a command-line tool."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from ..stack import check_stack
from .errors import command_line, describe

Result = TypeVar('Result')


def run_tool(run: Callable[[argparse.Namespace], Result], args: argparse.Namespace) -> Result:
    """Call `run(args)` as a tool: errors end the program with one line.

    Args:
        run: The work.
        args: With `debug` of `add_options`: let errors through, with their traceback.

    Returns:
        What `run` returns.
    """
    with command_line(args.debug):
        check_stack()
        return run(args)


class go_on:
    """Context of one of many items of a tool's work: an error is told, and the work goes on.

    Args:
        name (str): The item, in words.
        failed (dict[str, str]): Gets the error, in one line, by the name.
        debug (bool): Let the error through, with its traceback.
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
