"""Keeps two trainings out of one folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.logging import print_log

try:
    import fcntl
except ImportError:
    # not on Windows
    fcntl = None  # type: ignore[assignment]

# what the system answers for a file that another process has locked
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder for this process until the block ends.

    The system drops the lock of a process that is killed, so that nothing has to be cleared away.
    Processes that this one forks, such as the workers of a dataloader, don't hold it.

    Args:
        folder (str | Path): Holds a file `.lock` for the time.

    Raises:
        ValueError: Another process holds the folder.
    """
    path = Path(folder, '.lock')
    file = _open_locked(path)
    try:
        os.ftruncate(file, 0)
        os.write(file, f'process {os.getpid()} on {socket.gethostname()}'.encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _open_locked(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, path)
        except BaseException:
            os.close(file)
            raise
        # else its former holder has removed it meanwhile
        if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
            return file
        os.close(file)


def _lock(file: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            holder = os.pread(file, 200, 0).decode(errors='replace') or 'another process'
            raise ValueError(
                f'{path.parent} is in use by another training ({holder}): wait for its end, or '
                'name another folder by --work-dir'
            ) from error
        # some network file systems have no locks
        print_log(f'{path} can not be locked ({error.strerror}): start no second training there')
