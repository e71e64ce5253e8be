"""A file is complete or does not exist, also when several processes write it."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from saga_mm.checkpoint.files import open_atomically, remove_leftovers, write_atomically


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / 'a.pth'
    with open_atomically(path) as first:
        first.write(b'half')
        write_atomically(path, b'second')
        # The temporary file of the first is neither moved into place nor removed by the second.
        assert path.read_bytes() == b'second'
        first.write(b' and half')
    assert path.read_bytes() == b'half and half'
    assert list(tmp_path.iterdir()) == [path]
    contents = [bytes([i]) * 10**5 for i in range(20)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda data: write_atomically(path, data), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')

    with pytest.raises(KeyboardInterrupt), open_atomically(path) as file:
        file.write(b'new')
        raise KeyboardInterrupt
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_only_leftovers_are_removed(tmp_path):
    kept = ['iter_1.pth', 'iter_1.pth.tmp', 'mine.tmp', 'a.0123456789abcdef.pkl.tmp']
    leftovers = ['iter_1.0123456789abcdef.pth.tmp', 'best_a_iter_1.0123456789abcdef.pth.tmp']
    for name in [*kept, *leftovers, 'last_checkpoint.0123456789abcdef.tmp']:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, '*.pth')
    remove_leftovers(tmp_path, 'last_checkpoint')
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize('name', ['iter_2.pth', 'last_checkpoint', 'a' * 251 + '.pth', '.hidden'])
def test_what_a_killed_writer_leaves_is_found(tmp_path, name):
    child = os.fork()
    if not child:
        with open_atomically(tmp_path / name):
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path, f'{name[:4]}*')
    assert not list(tmp_path.iterdir())
    write_atomically(tmp_path / name, b'1')
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rights_links_and_pipes(tmp_path):
    path = tmp_path / 'a'
    mask = os.umask(0o027)
    try:
        write_atomically(path, b'1')
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (tmp_path / 'link').symlink_to(path)
    write_atomically(tmp_path / 'link', b'2')
    assert (tmp_path / 'link').is_symlink()
    assert path.read_bytes() == b'2'
    os.mkfifo(tmp_path / 'pipe')
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit((tmp_path / 'pipe').read_bytes)
        write_atomically(tmp_path / 'pipe', b'3')
        assert read.result() == b'3'
    assert stat.S_ISFIFO((tmp_path / 'pipe').stat().st_mode)
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path, b'')
    assert error.value.filename == str(tmp_path)
