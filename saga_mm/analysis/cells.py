"""Runs measurements one by one, each in a new process, and keeps the finished ones.

The command of such a process is `python -m saga_mm.analysis.cells MODULE FUNCTION JSON`. It
calls the function with the settings of one measurement, and prints the result, a JSON object, in
the last line.
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mmengine.utils import ProgressBar


def run_cells(
    cells: Sequence[dict], measure: Callable[[dict], dict], log: str | Path
) -> list[dict]:
    """Run all measurements; one that fails or runs out of memory does not stop the others.

    Args:
        cells: Settings of each measurement, which JSON can hold.
        measure: A function at module level. Takes the settings, and returns a result, which JSON
            can hold.
        log: JSON-lines file of results. Measurements that it holds, without an error, are not
            repeated.

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
    for cell in cells:
        result = finished.get(_key(cell))
        if result is None or 'error' in result:
            result = _run(cell, measure)
            with log.open('a') as file:
                file.write(f'\n{json.dumps(dict(cell=cell, result=result))}\n')
        results.append({**cell, **result})
        progress.update()
    print(file=sys.stderr)
    return results


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


def _run(cell: dict, measure: Callable[[dict], dict]) -> dict:
    names = (measure.__module__, measure.__name__)
    command = [sys.executable, '-m', __spec__.name, *names, json.dumps(cell)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == -signal.SIGKILL:
        return dict(error='killed: out of memory')
    lines = process.stderr.strip().splitlines() or [f'exit status {process.returncode}']
    # on a GPU, and on a CPU
    full = ('OutOfMemoryError', "can't allocate memory")
    return dict(error='out of memory' if any(name in lines[-1] for name in full) else lines[-1])


if __name__ == '__main__':
    module, function, cell = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), function)(json.loads(cell))))
