"""Where the configs and tools are that come with this package."""

from __future__ import annotations

from pathlib import Path


def configs_dir() -> str:
    """The folder of the configs, with `classification`, `detection` or `segmentation` in it.

    Raises:
        FileNotFoundError: The package was copied without them.
    """
    return str(shipped('configs'))


def shipped(name: str) -> Path:
    """A folder of the repository: in `.mim` of an installed package, else beside the package.

    Args:
        name: 'configs' or 'tools'.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).parent
    for parent in (package / '.mim', package.parent):
        if (parent / name).is_dir():
            return (parent / name).resolve()
    raise FileNotFoundError(f'saga_mm in {package} was installed without its folder {name}')
