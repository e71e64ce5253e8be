"""Runs measurements one by one, each in a fresh process, and keeps what is finished."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.utils import ProgressBar


def run_cells(cells: Sequence[dict], script: str | Path, log: str | Path) -> list[dict]:
    """Measure every cell; one that fails, or runs out of memory, does not stop the others.

    Args:
        cells: Settings of one measurement each, as JSON has them.
        script: Called as `python SCRIPT --cell JSON`; prints its result, a JSON object, as the last
            line.
        log: JSON-lines file of results. A cell that stands there without an error is not run again.

    Returns:
        The settings of each cell together with its result, or with `error`, one line.
    """
    log = Path(log)
    finished = {}
    if log.exists():
        # an interrupted run may have left half a line
        lines = [line for line in log.read_text().splitlines() if line.endswith('}}')]
        finished = {_key(entry['cell']): entry['result'] for entry in map(json.loads, lines)}
    progress = ProgressBar(len(cells), file=sys.stderr)
    results = []
    for cell in cells:
        result = finished.get(_key(cell))
        if result is None or 'error' in result:
            result = _run(cell, script)
            with log.open('a') as file:
                file.write(f'\n{json.dumps(dict(cell=cell, result=result))}\n')
        results.append({**cell, **result})
        progress.update()
    print(file=sys.stderr)
    return results


def _key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


def _run(cell: dict, script: str | Path) -> dict:
    command = [sys.executable, str(script), '--cell', json.dumps(cell)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == -signal.SIGKILL:
        return dict(error='killed: out of memory')
    lines = process.stderr.strip().splitlines() or [f'exit status {process.returncode}']
    return dict(error='out of memory' if 'OutOfMemoryError' in lines[-1] else lines[-1])
