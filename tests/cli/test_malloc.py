"""How much freed memory of a tensor a process keeps, as the system reports it."""

import platform
import subprocess
import sys

import pytest

from saga_mm.cli import keep_freed_memory

SCRIPT = """
import sys
from pathlib import Path
import torch
from saga_mm.cli import keep_freed_memory

def resident():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096

if sys.argv[1] == 'keep':
    assert keep_freed_memory()
torch.ones(2**20)
before = resident()
large = torch.ones(2**26)
grown = resident() - before
del large
print(grown, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc')
@pytest.mark.parametrize('mode', ['keep', 'return'])
def test_freed_memory(mode):
    command = [sys.executable, '-c', SCRIPT, mode]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, left = map(int, out.split())
    size = 4 * 2**26
    assert grown == pytest.approx(size, rel=0.1)
    assert left == pytest.approx(size if mode == 'keep' else 0, abs=0.1 * size)


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(platform, 'libc_ver', lambda: ('', ''))
    assert not keep_freed_memory()
