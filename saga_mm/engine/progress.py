"""Prints how far a training or a test is."""

from __future__ import annotations

import sys
import time
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..registry import HOOKS


@HOOKS.register_module()
class ProgressHook(Hook):
    """Prints a line with the iteration, the loss and the time that is left.

    On a terminal, the line is written anew; else there is one for each tenth of the work.
    """

    priority = 'VERY_LOW'

    def before_train(self, runner: Runner) -> None:
        self._start = time.monotonic()
        self._first = runner.iter

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict | None = None,
    ) -> None:
        loss = f', loss {outputs["loss"].item():.2f}' if outputs and 'loss' in outputs else ''
        self._print('training', runner.iter + 1, runner.max_iters, self._first, loss)

    def before_test(self, runner: Runner) -> None:
        self._start = time.monotonic()

    def after_test_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        self._print('test', batch_idx + 1, len(runner.test_dataloader), 0, '')

    def _print(self, name: str, done: int, total: int, first: int, loss: str) -> None:
        terminal = sys.stdout.isatty()
        if not terminal and done * 10 // total == (done - 1) * 10 // total:
            return
        left = (time.monotonic() - self._start) / (done - first) * (total - done)
        text = f'{name}: {done} of {total} iterations{loss}, {left / 60:.1f} min left'
        end = '' if terminal and done < total else '\n'
        print(f'\r{text}\033[K' if terminal else text, end=end, flush=True)
