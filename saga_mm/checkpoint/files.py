"""Files that are whole or not there, and folders to write them to."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

# Name of a file that is being written, see `open_atomically`.
LEFTOVER = re.compile(r'(.*)\.[0-9a-f]{16}(\.[^.]*)?\.tmp')


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file so that at any moment it is the old one or the new one, also after a power cut.

    Raises:
        OSError: Names `path`, which is as it was.
    """
    try:
        with open_atomically(path) as file:
            file.write(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def open_atomically(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file to write, which takes its place when the context ends without an error.

    Until then it has a unique name in the same folder, so that several processes may write one
    file. If `path` is a link, the file that it points to is written. A pipe or a device is written
    directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with open(path, 'wb') as file:
            yield file
        return
    # shortened, because the name may have the maximum length
    name = f'{path.stem[:40]}.{secrets.token_hex(8)}{path.suffix[:20]}.tmp'
    temporary = path.with_name(name)
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # the name, too, is to survive a power cut; not every file system can
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: str | Path, pattern: str) -> None:
    """Remove incomplete files that killed processes have left, of names such as '*.pth'.

    No other process may be writing such a file.
    """
    for path in Path(folder).glob('*.tmp'):
        parts = LEFTOVER.fullmatch(path.name)
        if parts and fnmatchcase(parts[1] + (parts[2] or ''), pattern):
            path.unlink(missing_ok=True)


def make_folder(path: str | Path) -> None:
    """Make a folder, unless there is one, and see that it can be written; OSError if not."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f'{folder} can not be written: name another folder')
