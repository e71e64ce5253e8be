"""Finds the checkpoint that a training is resumed from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log

from .errors import CheckpointError
from .loading import load_file


def latest_checkpoint(work_dir: str | Path) -> str:
    """The checkpoint to resume from: the one that `last_checkpoint` names.

    If that can't be resumed, it is the newest one in the folder that can, and a line tells so.

    Raises:
        CheckpointError: There is none.
    """
    note = Path(work_dir, 'last_checkpoint')
    named = note.read_text(errors='replace').strip() if note.is_file() else ''
    problem = _problem(named) if named else f'{note} is missing or empty'
    if not problem:
        return named
    files = Path(work_dir).glob('*.pth')
    for path in sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True):
        if not _problem(path):
            print_log(f'{problem}: resuming from {path}, the newest checkpoint that is whole')
            return str(path)
    raise CheckpointError(
        f'nothing to resume: {work_dir} has no checkpoint of an earlier run ({problem})'
    )


def missing_for_resume(checkpoint: Mapping) -> list[str]:
    """What a training can't go on without, and this checkpoint doesn't hold."""
    return sorted({'meta', 'message_hub', 'optimizer'} - checkpoint.keys())


def _problem(path: str | Path) -> str:
    """Why a checkpoint can't be resumed; empty if it can."""
    try:
        missing = missing_for_resume(load_file(path))
    except CheckpointError as error:
        return str(error)
    return f'{path} holds no {", ".join(missing)}' if missing else ''
