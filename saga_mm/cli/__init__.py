"""What the command-line tools share: options, errors, checks before a run, processes."""

from .errors import command_line
from .launch import prepare
from .malloc import keep_freed_memory
from .options import ConfigOptions, add_common_arguments, add_options, byte_size, load_config
from .preflight import check_data
from .tool import go_on, print_written, run_tool

__all__ = [
    'ConfigOptions',
    'add_common_arguments',
    'add_options',
    'byte_size',
    'check_data',
    'command_line',
    'go_on',
    'keep_freed_memory',
    'load_config',
    'prepare',
    'print_written',
    'run_tool',
]
