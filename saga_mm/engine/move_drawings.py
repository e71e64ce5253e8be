"""Lets only whole drawings into the folder of a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..checkpoint import make_folder
from ..registry import HOOKS


@HOOKS.register_module()
class MoveDrawingsHook(Hook):
    """Moves the drawings of a test to a folder after each iteration, when they are whole.

    The visualizers of the toolboxes write their files in place, so that a full disk or a killed
    process leaves part of a file where the drawing of an earlier run was. With this hook they write
    to `source`, and replace the earlier drawings when theirs are complete.

    Args:
        folder (str | Path): Where the drawings go. It is made if it is missing.

    Attributes:
        source (Path): A temporary folder inside `folder`. The hook is a context manager, which
            removes this folder at its end.
    """

    priority = 'LOWEST'

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).resolve()
        make_folder(self.folder)
        self._temporary = TemporaryDirectory(dir=self.folder, prefix='.', suffix='.tmp')
        self.source = Path(self._temporary.name)

    def __enter__(self) -> MoveDrawingsHook:
        return self

    def __exit__(self, *args: object) -> None:
        self._temporary.cleanup()

    def after_test_iter(self, *args: Any, **kwargs: Any) -> None:
        for path, target in self._files():
            # others are logs of the visualizer, which it still adds to
            if path.suffix in ('.png', '.jpg', '.jpeg'):
                _move(path, target)

    def after_test(self, runner: Runner) -> None:
        for path, target in self._files():
            _move(path, target)

    def _files(self) -> Iterator[tuple[Path, Path]]:
        for path in sorted(self.source.rglob('*')):
            if path.is_file():
                yield path, self.folder / path.relative_to(self.source)


def _move(path: Path, target: Path) -> None:
    make_folder(target.parent)
    os.replace(path, target)
