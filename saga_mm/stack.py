"""Which OpenMMLab stack is installed, and whether it is one stack.

The original packages and the OneDL fork have the same import names. When both are installed, the
later one has overwritten files of the earlier one, and the errors that follow name neither. This
module detects that in advance. It imports only the standard library, so that
`python saga_mm/stack.py` works even if no other package can be imported.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distributions, version
from importlib.util import find_spec

IMPORT_NAMES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')


class StackError(RuntimeError):
    """Several distributions provide the same import name. The message is one line."""


def providers() -> dict[str, set[str]]:
    """Return the names of the installed distributions that provide each of `IMPORT_NAMES`."""
    found: dict[str, set[str]] = {name: set() for name in IMPORT_NAMES}
    for distribution in distributions():
        for name in _import_names(distribution):
            found[name].add(distribution.metadata['Name'])
    return found


def check_stack() -> None:
    """Raise `StackError` if two installed distributions provide one of `IMPORT_NAMES`.

    The check takes a fraction of a second. The tools and the set-up call it; `import saga_mm` does
    not.
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


def describe_missing_ops() -> str:
    """What to do about an mmcv without `mmcv._ext`, its compiled ops, in one line."""
    found = sorted(providers()['mmcv']) or ['mmcv']
    # mmcv-lite is mmcv without ops, under another name
    wanted = found[0].replace('mmcv-lite', 'mmcv')
    remove = '' if found == [wanted] else f'`pip uninstall -y {" ".join(found)}`, then '
    pin = f'=={version(wanted)}' if found == [wanted] else ''
    return (
        f'{" and ".join(found)} has no compiled ops (mmcv._ext), which detectors need: pip builds '
        f'them only where it sees torch. Run {remove}`pip install torch "setuptools<81" wheel '
        'ninja psutil`, then `pip install --no-build-isolation --no-deps --no-cache-dir '
        f'--force-reinstall {wanted}{pin}`'
    )


def describe_missing_toolbox(name: str) -> str:
    """What to install if the toolbox `name` is missing; '' if it is there, or is no toolbox."""
    packages = dict(mmdet='mmdet', mmpretrain='mmpretrain', mmseg='mmsegmentation')
    if name not in packages or find_spec(name) is not None:
        return ''
    package = packages[name]
    if providers()['mmengine'] == {'onedl-mmengine'}:
        package = f"'saga_mm[onedl{',pretrain' if name == 'mmpretrain' else ''}]'"
    return f'{name} is not installed: pip install {package}'


def _import_names(distribution: Distribution) -> set[str]:
    # importlib.metadata.packages_distributions() is not used, because in Python 3.10 it reads only
    # top_level.txt, which some build back ends do not write.
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
