"""Runs the work of a command-line tool."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

from ..stack import check_stack
from .errors import command_line

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
