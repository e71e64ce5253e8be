"""The tools as one command: `saga_mm train CONFIG`, or `python -m saga_mm train CONFIG`.

A command is a script of the folder `tools`, which is part of an installed package.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import sys
from pathlib import Path

from saga_mm.shipped import shipped

ALIASES = {'flops': 'get_flops', 'analyze': 'analyze_attention', 'convert': 'convert_checkpoint'}
# it starts processes that import it, for which it has to be a script
SCRIPTS_ONLY = ('compile_kernels',)


def commands() -> dict[str, Path]:
    """The script of each command, also of the short names."""
    scripts = {path.stem: path for path in sorted(shipped('tools').glob('*.py'))}
    found = {name: path for name, path in scripts.items() if name not in SCRIPTS_ONLY}
    return found | {name: scripts[tool] for name, tool in ALIASES.items()}


def describe(scripts: dict[str, Path]) -> str:
    """The help: each command with what it does."""
    lines = ['usage: saga_mm COMMAND [options]', '', 'commands:']
    for name, path in scripts.items():
        if name in ALIASES:
            purpose = f'short for {path.stem}'
        else:
            text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
            purpose = text.partition('\n')[0]
        lines.append(f'  {name:<20}{purpose}')
    return '\n'.join([*lines, '', 'saga_mm COMMAND --help describes the options of a command.'])


def main() -> object:
    """Run the command that the first argument names, with the other arguments."""
    scripts = commands()
    name, *arguments = sys.argv[1:] or ['--help']
    if name in ('-h', '--help'):
        print(describe(scripts))
        return None
    if name not in scripts:
        near = difflib.get_close_matches(name, scripts, 1) or ['--help']
        sys.exit(f'error: there is no command {name!r}: did you mean `saga_mm {near[0]}`?')
    spec = importlib.util.spec_from_file_location(f'saga_mm_{name}', scripts[name])
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool
    sys.argv = [f'saga_mm {name}', *arguments]
    spec.loader.exec_module(tool)
    return tool.main()


if __name__ == '__main__':
    main()
