"""Which OpenMMLab stack is installed, and whether it is one stack.

The original packages and the OneDL fork have the same import names. When both are installed, the
later one has overwritten files of the earlier one, and the errors that follow name neither. This
module finds that out beforehand. It imports only the standard library, so that it works where
nothing else does: `python saga_mm/stack.py`.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions

IMPORT_NAMES = ('mmengine', 'mmcv', 'mmdet', 'mmseg')


class StackError(RuntimeError):
    """Several distributions stand behind one import name. The message is one line."""


def providers() -> dict[str, set[str]]:
    """Returns the names of the installed distributions behind each of `IMPORT_NAMES`."""
    found: dict[str, set[str]] = {name: set() for name in IMPORT_NAMES}
    for distribution in distributions():
        for name in _import_names(distribution):
            found[name].add(distribution.metadata['Name'])
    return found


def check_stack() -> None:
    """Raises `StackError` when two distributions are installed behind one of `IMPORT_NAMES`.

    Takes a fraction of a second; called by the tools and by the set-up, not by `import saga_mm`.
    """
    doubled = {name: sorted(names) for name, names in providers().items() if len(names) > 1}
    if not doubled:
        return
    clashes = '; '.join(f'{name}: {" and ".join(names)}' for name, names in doubled.items())
    remove = ' '.join(sorted(set().union(*doubled.values())))
    raise StackError(
        f'two distributions provide the same import name ({clashes}) and have overwritten each '
        f'other. Use a new environment, or run `pip uninstall -y {remove}` and install one of them '
        'again'
    )


def _import_names(distribution: Distribution) -> set[str]:
    # importlib.metadata.packages_distributions() would do, but in Python 3.10 it reads only
    # top_level.txt, which not every build back end writes
    declared = (distribution.read_text('top_level.txt') or '').split()
    record = (distribution.read_text('RECORD') or '').splitlines()
    files = {line.partition(',')[0] for line in record}
    return {name for name in IMPORT_NAMES if name in declared or f'{name}/__init__.py' in files}


if __name__ == '__main__':
    try:
        check_stack()
    except StackError as error:
        sys.exit(f'error: {error}')
    for name, names in providers().items():
        print(f'{name}: {", ".join(names) or "not installed"}')
