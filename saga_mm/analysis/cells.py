"""Runs measurements one by one in other processes, and keeps the finished ones.

The command of such a process is `python -m saga_mm.analysis.cells MODULE FUNCTION`. It reads the
settings of measurements, each a JSON object in a line, calls the function with them, and prints
each result, a JSON object, in a line that starts with `RESULT`.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.utils import ProgressBar

RESULT = 'result: '


def run_cells(
    cells: Sequence[dict],
    measure: Callable[[dict], dict],
    log: str | Path,
    new_process: bool = True,
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
    progress = ProgressBar(len(cells), file=sys.stderr)
    results = []
    worker = _Worker(measure)
    try:
        for cell in cells:
            result = finished.get(_key(cell))
            if result is None or 'error' in result:
                result = worker.run(cell)
                if new_process:
                    worker.stop()
                with log.open('a') as file:
                    file.write(f'\n{json.dumps(dict(cell=cell, result=result))}\n')
            results.append({**cell, **result})
            progress.update()
    finally:
        worker.stop()
    print(file=sys.stderr)
    return results


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


class _Worker:
    """A process that runs measurements. It starts with the first one, and again after an error."""

    def __init__(self, measure: Callable[[dict], dict]) -> None:
        names = (measure.__module__, measure.__name__)
        self.command = [sys.executable, '-m', __spec__.name, *names]
        self.process: subprocess.Popen | None = None

    def run(self, cell: dict) -> dict:
        if self.process is None:
            self.errors = tempfile.TemporaryFile('w+')  # noqa: SIM115
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        assert self.process.stdin and self.process.stdout
        print(json.dumps(cell), file=self.process.stdin, flush=True)
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


if __name__ == '__main__':
    module, name = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    for line in sys.stdin:
        print(f'{RESULT}{json.dumps(function(json.loads(line)))}', flush=True)
