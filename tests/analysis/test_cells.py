"""saga_mm.analysis.cells: measurements side by side, and what is left of them after a stop."""

import fcntl
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from saga_mm.analysis.cells import RESULT, run_cells

MODULE = """
import fcntl
import time
from pathlib import Path

def wait_for_others(cell):
    Path(cell['own']).touch()
    while not all(Path(path).exists() for path in cell['all']):
        time.sleep(0.02)
    return dict(answer=cell['own'])

def kind(cell):
    return dict(answer=repr(cell['scale']))

def talk(cell):
    print('50 %', end='')
    return dict(answer=cell['number'])

def work(cell):
    if cell['wait']:
        file = open(cell['file'], 'a')
        fcntl.flock(file, fcntl.LOCK_EX)
        print('waiting', file=file, flush=True)
        time.sleep(60)
        print('ended', file=file, flush=True)
    return dict(answer=42)
"""
DRIVER = """
import json
import signal
import sys

from measure_side_by_side import work
from saga_mm.analysis.cells import run_cells

# A shell may have told its background jobs to ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
run_cells(json.loads(sys.argv[1]), work, sys.argv[2], jobs=2)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / 'measure_side_by_side.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    monkeypatch.setenv('PYTHONPATH', path.rstrip(os.pathsep))
    return importlib.import_module('measure_side_by_side')


def test_cells_run_side_by_side(module, tmp_path):
    files = [str(tmp_path / name) for name in 'ab']
    cells = [dict(own=file, all=files) for file in files]
    reports = []
    log = tmp_path / 'log.jsonl'
    results = run_cells(cells, module.wait_for_others, log, jobs=2, report=reports.append)
    # The results have the order of the cells, whichever ended first.
    assert [result['answer'] for result in results] == files
    assert [len(report) for report in reports] == [0, 1, 2]
    assert reports[-1] == results
    assert run_cells(cells, module.wait_for_others, log, jobs=2) == results


def test_tuples_stay_tuples(module, tmp_path):
    # Transforms of mmcv take a scale of two numbers as a tuple, and refuse a list.
    cells = [dict(scale=(512, 512)), dict(scale=[512])]
    results = run_cells(cells, module.kind, tmp_path / 'log.jsonl')
    assert [result['answer'] for result in results] == ['(512, 512)', '[512]']


def test_results_start_a_line_after_text_without_a_line_break(module, tmp_path):
    cells = [dict(number=number) for number in (1, 2)]
    # The process alone first, for `run_cells` waits for such a line as long as the process runs.
    read, write = os.pipe()
    command = [sys.executable, '-m', 'saga_mm.analysis.cells', module.__name__, 'talk', str(read)]
    lines = ''.join(f'{pickle.dumps(cell).hex()}\n' for cell in cells)
    done = subprocess.run(
        command, input=lines, stdout=subprocess.PIPE, text=True, pass_fds=[read], check=True
    )
    os.close(read)
    os.close(write)
    found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    assert found == [f'{RESULT}{{"answer": {number}}}' for number in (1, 2)]
    results = run_cells(cells, module.talk, tmp_path / 'log.jsonl', new_process=False)
    assert [result['answer'] for result in results] == [1, 2]


@pytest.mark.parametrize('how', ['SIGINT', 'SIGKILL'])
def test_a_stop_ends_what_runs_and_keeps_what_is_finished(module, tmp_path, how):
    log = tmp_path / 'log.jsonl'
    files = [tmp_path / name for name in 'abcd']
    cells = [dict(wait=bool(i), file=str(file)) for i, file in enumerate(files)]
    command = [sys.executable, '-c', DRIVER, json.dumps(cells), log]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (log.exists() and files[1].exists() and files[1].read_text()):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.Signals[how])
    assert driver.wait() != 0
    for file in files[1:]:
        if file.exists():
            # The lock is free when the process that held it is gone.
            with file.open() as opened:
                fcntl.flock(opened, fcntl.LOCK_EX)
            assert 'ended' not in file.read_text()
    # The last cell was waiting for its turn.
    assert not files[3].exists()
    (entry,) = (json.loads(line) for line in log.read_text().splitlines() if line)
    assert entry == dict(cell=cells[0], result=dict(answer=42))
