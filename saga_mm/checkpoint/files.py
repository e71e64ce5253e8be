"""Files that are whole or not there, and folders to write them to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

TEMPORARY = '.tmp'


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at any moment it is the old one or the new one, also after a power cut.

    Raises:
        OSError: Names `path`, which is as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    # the name, too, is to survive a power cut; not every file system can
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: str | Path) -> None:
    """Make a folder, unless there is one, and see that it can be written; OSError if not."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{folder} can not be written: name another folder')
