import os
import signal
from contextlib import contextmanager

import pytest

from harness import other_process
from saga_mm.cli.lock import locked


def test_one_process_holds_a_folder(tmp_path):
    with other_process(locked, tmp_path) as process:
        for _ in range(2):
            message = f'in use by .* \\(process {process} on'
            with pytest.raises(ValueError, match=message), locked(tmp_path):
                pass
        # A refused process does not remove the lock.
        assert (tmp_path / '.lock').exists()
    # After the kill, the file still exists but locks nothing.
    assert (tmp_path / '.lock').exists()
    with locked(tmp_path):
        assert (tmp_path / '.lock').read_text().startswith(f'process {os.getpid()} on ')
    assert not list(tmp_path.iterdir())


def test_an_error_ends_the_lock(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
    assert not list(tmp_path.iterdir())


@contextmanager
def locked_with_worker(folder, note):
    """A holder with a child that outlives it for some seconds, like a worker of a training."""
    with locked(folder):
        worker = os.fork()
        if not worker:
            signal.pause()
        note.write_text(str(worker))
        yield


def test_a_child_of_a_killed_process_does_not_hold_it(tmp_path):
    (tmp_path / 'work').mkdir()
    with other_process(locked_with_worker, tmp_path / 'work', tmp_path / 'worker'):
        pass
    worker = int((tmp_path / 'worker').read_text())
    os.kill(worker, 0)
    with locked(tmp_path / 'work'):
        pass
    os.kill(worker, signal.SIGKILL)


def test_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr('saga_mm.cli.lock.fcntl.lockf', lockf)
    with locked(tmp_path):
        pass
    assert 'can not be locked (Operation not supported)' in capsys.readouterr().out
