"""Runs measurements in other processes, and keeps the finished ones.

The command of such a process is `python -m saga_mm.analysis.cells MODULE FUNCTION PIPE`. It reads
the settings of measurements, each pickled and in a line, because JSON makes lists of tuples. It
calls the function with them, and prints each result, a JSON object, in a line that starts with
`RESULT`. It ends when the other end of the pipe is closed: when the process that started it stops
or dies, in whatever way.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from mmengine.utils import ProgressBar

RESULT = 'result: '


def run_cells(
    cells: Sequence[dict],
    measure: Callable[[dict], dict],
    log: str | Path,
    new_process: bool = True,
    jobs: int = 1,
    report: Callable[[list[dict]], None] = lambda results: None,
) -> list[dict]:
    """Run all measurements; one that fails or runs out of memory does not stop the others.

    Args:
        cells: Settings of each measurement, which JSON can hold.
        measure: A function at module level. Takes the settings, and returns a result, which JSON
            can hold.
        log: JSON-lines file of results. Measurements that it holds, without an error, are not
            repeated.
        new_process: Run each measurement in a process of its own, as the memory of a process needs
            it. Otherwise one process runs them all, until a measurement fails in it. Defaults to
            True.
        jobs: Number of measurements that run side by side. Defaults to 1.
        report: Called with the results that are there, in the order of the cells, at the start and
            after each measurement. Defaults to a function that does nothing.

    Returns:
        For each measurement its settings together with its result or, if it failed, with `error`,
        a message in one line.
    """
    log = Path(log)
    finished = {}
    if log.exists():
        # an interrupted run may have left an incomplete line
        lines = [line for line in log.read_text().splitlines() if line.endswith('}}')]
        finished = {_key(entry['cell']): entry['result'] for entry in map(json.loads, lines)}
    earlier = (finished.get(_key(cell), dict(error='')) for cell in cells)
    results = {i: result for i, result in enumerate(earlier) if 'error' not in result}
    missing = [i for i in range(len(cells)) if i not in results]

    def so_far() -> list[dict]:
        return [{**cells[i], **results[i]} for i in sorted(results)]

    report(so_far())
    progress = ProgressBar(len(missing), file=sys.stderr)
    with _workers(measure, new_process, jobs) as start:
        futures = {start(cells[i]): i for i in missing}
        for future in as_completed(futures):
            i = futures[future]
            results[i] = future.result()
            with log.open('a') as file:
                file.write(f'\n{json.dumps(dict(cell=cells[i], result=results[i]))}\n')
            report(so_far())
            progress.update()
    print(file=sys.stderr)
    return so_far()


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


@contextmanager
def _workers(
    measure: Callable[[dict], dict], new_process: bool, jobs: int
) -> Iterator[Callable[[dict], Future]]:
    """A function that starts a measurement, when one of the workers is free. They end with it."""
    stop, hold = os.pipe()
    idle = [_Worker(measure, stop) for _ in range(jobs)]

    def run(cell: dict) -> dict:
        worker = idle.pop()
        try:
            return worker.run(cell)
        finally:
            if new_process:
                worker.stop()
            idle.append(worker)

    with os.fdopen(stop), ThreadPoolExecutor(jobs) as pool, os.fdopen(hold, 'w'):
        try:
            yield lambda cell: pool.submit(run, cell)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    for worker in idle:
        worker.stop()


class _Worker:
    """A process that runs measurements. It starts with the first one, and again after an error."""

    def __init__(self, measure: Callable[[dict], dict], pipe: int) -> None:
        names = (measure.__module__, measure.__name__)
        self.command = [sys.executable, '-m', __spec__.name, *names, str(pipe)]
        self.pipe = pipe
        self.process: subprocess.Popen | None = None

    def run(self, cell: dict) -> dict:
        if self.process is None:
            self.errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                pass_fds=[self.pipe],
                text=True,
            )
        assert self.process.stdin and self.process.stdout
        print(pickle.dumps(cell).hex(), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith(RESULT):
                return json.loads(line.removeprefix(RESULT))
        status = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f'exit status {status}']
        self.stop()
        if status == -signal.SIGKILL:
            return dict(error='killed: out of memory')
        # on a GPU, and on a CPU
        full = ('OutOfMemoryError', "can't allocate memory")
        return dict(error='out of memory' if any(name in lines[-1] for name in full) else lines[-1])

    def stop(self) -> None:
        if self.process is not None:
            self.process.communicate()
            self.errors.close()
            self.process = None


def _end_with(pipe: int) -> None:
    os.read(pipe, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    module, name, pipe = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(pipe),), daemon=True).start()
    function = getattr(importlib.import_module(module), name)
    for line in sys.stdin:
        cell = pickle.loads(bytes.fromhex(line))
        result = json.dumps(function(cell))
        # The function may have printed text without a line break at its end.
        print(f'\n{RESULT}{result}', flush=True)
