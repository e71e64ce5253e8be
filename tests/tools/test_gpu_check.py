"""tools/gpu_check.sh, with a Python that records its arguments in place of running on a GPU."""

import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RECORDER = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$RECORD"
echo >> "$RECORD"
if [[ "$*" == *--out-dir* ]]; then
    while [ "$1" != --out-dir ]; do shift; done
    mkdir -p "$2" && echo table > "$2/ops.md"
fi
"""


@pytest.fixture
def check(tmp_path):
    """Runs the script; returns the commands that it gave to Python, as lists of arguments."""
    recorder = tmp_path / 'python'
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    record = tmp_path / 'record'
    record.touch()

    def run(mode):
        command = [ROOT / 'tools/gpu_check.sh', mode, tmp_path / 'out']
        environment = {**os.environ, 'PYTHON': str(recorder), 'RECORD': str(record)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return [shlex.split(line) for line in record.read_text().splitlines()]

    return run


def test_all_gpu_tests_run_to_the_end(check, tmp_path):
    (command,) = [command for command in check('tests') if 'pytest' in command]
    assert '-x' not in command
    assert command[command.index('-n') + 1] == '12'
    named = {word for word in command if word.startswith('tests/')}
    needed = {
        path.relative_to(ROOT).as_posix()
        for pattern in ('kernels/test_triton_*.py', '*/test_*gpu.py', 'inference/test_fused.py')
        for path in (ROOT / 'tests').glob(pattern)
        # These two need no GPU.
        if path.stem not in ('test_triton_compile', 'test_triton_traffic')
    }
    assert named == needed
    assert (tmp_path / 'out' / 'tests.txt').is_file()


def test_benchmarks_come_back_in_one_file(check, tool, tmp_path):
    commands = check('bench')
    ops = [command[1:] for command in commands if command[0] == 'tools/benchmark_ops.py']
    known = tool('benchmark_ops')
    assert {known.parse_args(arguments).op for arguments in ops} == set(known.OPS)
    (models,) = [command[1:] for command in commands if command[0] == 'tools/benchmark.py']
    benchmark = tool('benchmark')
    assert set(benchmark.parse_args(models).models) <= set(benchmark.KNOWN)
    with tarfile.open(tmp_path / 'out' / 'bench.tar.gz') as archive:
        files = {name.removeprefix('./') for name in archive.getnames()}
    assert {'log.txt', *(f'{op}/ops.md' for op in known.OPS)} <= files


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_without_a_gpu_it_says_so(tmp_path):
    command = [ROOT / 'tools/gpu_check.sh', 'tests', tmp_path]
    environment = {**os.environ, 'PYTHON': sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'gpu_check.sh needs a GPU' in done.stdout
