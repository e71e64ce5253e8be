"""Saves checkpoints whole or not at all.

mmengine opens the file that it replaces, and removes the oldest checkpoint before it writes the
next: a kill or a full disk at that moment can leave nothing to resume from.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ..checkpoint.files import make_folder, remove_leftovers, write_atomically
from ..registry import HOOKS

BACKEND = 'saga_mm.atomic'


@register_backend(BACKEND, force=True)
class AtomicBackend(LocalBackend):
    """Local files for mmengine: written atomically, and removed only by `remove_outdated`."""

    def __init__(self) -> None:
        self.outdated: list[str] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        write_atomically(filepath, obj)

    def remove(self, filepath: str | Path) -> None:
        self.outdated.append(str(filepath))

    rmtree = remove

    def remove_outdated(self, folder: str | Path, needed: Iterable[str] = ()) -> None:
        """Remove what should have been removed from a folder, but for files written again.

        The best checkpoint of a copied work dir lies in the original one, and stays.
        """
        for path in set(self.outdated) - set(needed):
            if Path(path).resolve().parent != Path(folder).resolve():
                continue
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                Path(path).unlink(missing_ok=True)
        self.outdated.clear()


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook`, so that a kill or a full disk never costs what is there.

    A checkpoint is written next to its place and moved there when it is whole; then
    `last_checkpoint` names it; then outdated ones are removed. That holds for the best checkpoints
    as well. For a remote `out_dir` or other `backend_args` it depends on that storage whether a
    file is written whole. What `published_keys` asks for is written by mmengine.

    Args:
        **options: Those of `CheckpointHook`; unknown ones are errors, and so is the deprecated
            `file_client_args`.
    """

    file_backend: Any
    keep_ckpt_ids: deque[int]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._check_options()

    @classmethod
    def take_over(cls, hook: CheckpointHook) -> AtomicCheckpointHook:
        """A hook with the options of one of mmengine's that has not run; ValueError as above."""
        taken = cls.__new__(cls)
        taken.__dict__.update(vars(hook))
        taken._check_options()
        return taken

    def _check_options(self) -> None:
        unknown = sorted(self.args) + ['file_client_args'] * bool(self.file_client_args)
        if unknown:
            raise ValueError(
                f'the checkpoint hook takes the options of CheckpointHook, got {", ".join(unknown)}'
            )
        # whole numbers may be floats, as in 1e4, but where a number is kept
        kinds = dict(interval=Real, save_begin=Real, max_keep_ckpts=Integral)
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f'{name} must be an int, got {getattr(self, name)!r}')

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # with an untouched backend, the folder is on this machine
        if type(self.file_backend) is not LocalBackend:
            return
        self.backend_args = dict(backend=BACKEND)
        self.file_backend = AtomicBackend()
        if is_main_process():
            make_folder(self.out_dir)
            # of a run that was killed
            remove_leftovers(self.out_dir, f'*{Path(self.filename_tmpl).suffix}')
            remove_leftovers(runner.work_dir, 'last_checkpoint')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save, then name the file in `last_checkpoint`, then remove outdated ones."""
        outdated = self._keep(runner, step) if self.max_keep_ckpts > 0 else []
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if not is_main_process():
            return
        write_atomically(Path(runner.work_dir, 'last_checkpoint'), str(self.last_ckpt).encode())
        for old in outdated:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.exists(path):
                self.file_backend.remove(path)
        self._remove_outdated()

    def _keep(self, runner: Runner, step: int) -> list[int]:
        """Count a step to those that are kept; returns the ones that are too many by then."""
        steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
        # a resumed run removes the first ones of too many: those that a kill has left
        runner.message_hub.update_info('keep_ckpt_ids', steps)
        self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
        return steps[: -self.max_keep_ckpts]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """As mmengine does; but the former best is removed when the new one is saved."""
        for name in self.save_best or ():
            if name not in metrics and name != 'auto':
                raise ValueError(f'save_best must be of {sorted(metrics)}, got {name!r}')
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        if isinstance(self.file_backend, AtomicBackend) and is_main_process():
            paths = getattr(self, 'best_ckpt_path_dict', {}).values()
            best = [getattr(self, 'best_ckpt_path', None), *paths]
            self.file_backend.remove_outdated(self.out_dir, needed=filter(None, best))
