"""Lets a resumed training follow the schedule of its config."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import _ParamScheduler
from mmengine.runner import IterBasedTrainLoop, Runner

from ..registry import HOOKS

# what a scheduler keeps besides its settings
PROGRESS = ('_global_step', '_last_value', 'last_step', 'optimizer', 'verbose')


@HOOKS.register_module()
class ResumeScheduleHook(Hook):
    """Lets a resumed training follow the schedule of its config, where that has been changed.

    mmengine restores the schedulers of learning rate and momentum with their settings. A training
    that is resumed with a larger `max_iters` would do the added iterations with a learning rate of
    0, where the old schedule ended. This hook runs the schedule of the config up to the iteration
    of the checkpoint, so that the learning rate is that of a training with this config from the
    start. So it does if the config has another learning rate to start from. It does nothing where
    the settings are those of the checkpoint.

    `ReduceOnPlateauLR` depends on metrics that are not kept: such schedules stay as they are
    restored.
    """

    # after `CheckpointCheckHook`, which checks the state that is compared here
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.configured: list[dict] = []
        # of each group of parameters, for each scheduler
        self.starts: list[list[dict]] = []
        self.changes: list[str] = []

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # before mmengine restores them
        schedulers = list(_schedulers(runner.param_schedulers))
        self.configured = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
        self.starts = [
            [_start(group, scheduler.param_name) for group in scheduler.optimizer.param_groups]
            for scheduler in schedulers
        ]
        saved = list(_schedulers(checkpoint.get('param_schedulers'), dict))
        self.changes = [
            change
            for scheduler, state in zip(schedulers, saved, strict=False)
            for change in _changes(scheduler, state)
        ]
        if len(saved) != len(schedulers):
            self.changes.append(f'{len(saved)} schedulers -> {len(schedulers)}')

    def before_train(self, runner: Runner) -> None:
        # weights of another training are no resume
        if not self.changes or runner.iter == 0:
            return
        changes = f'the config has another schedule than the checkpoint ({"; ".join(self.changes)})'
        schedulers = list(_schedulers(runner.param_schedulers))
        if any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers):
            message = f'{changes}, whose schedule is kept, for it depends on metrics'
        else:
            self._run_up_to(runner, schedulers)
            message = f'{changes}: that of the config is followed, {_describe(schedulers)}'
        print_log(message, 'current', logging.WARNING)

    def _run_up_to(self, runner: Runner, schedulers: list[_ParamScheduler]) -> None:
        """Start the schedule of the config, and step to where the training is."""
        for scheduler, state, starts in zip(schedulers, self.configured, self.starts, strict=True):
            scheduler.load_state_dict({**state, 'last_step': -1, '_global_step': -1})
            for group, start in zip(scheduler.optimizer.param_groups, starts, strict=True):
                group.update(start)
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        rounds, length = (
            (runner.epoch, len(runner.train_dataloader)) if by_epoch else (1, runner.iter)
        )
        with warnings.catch_warnings():
            # of a scheduler's step before one of the optimizer
            warnings.simplefilter('ignore')
            _step(schedulers)
            for _ in range(rounds):
                for _ in range(length):
                    _step(scheduler for scheduler in schedulers if not scheduler.by_epoch)
                if by_epoch:
                    _step(scheduler for scheduler in schedulers if scheduler.by_epoch)


def _start(group: dict, name: str) -> dict:
    """What a schedule keeps in a group of parameters, with the value that it starts from."""
    kept = {key: group[key] for key in (f'{end}_{name}' for end in ('max', 'min')) if key in group}
    first = group.get(f'initial_{name}', group[name])
    return {name: first, f'initial_{name}': first, **kept}


def _schedulers(found: object, kind: type = _ParamScheduler) -> Iterator:
    """Schedulers, or their states, out of the lists and dicts that mmengine keeps them in."""
    if isinstance(found, kind) and 'by_epoch' in (
        found if isinstance(found, dict) else vars(found)
    ):
        yield found
    elif isinstance(found, (list, tuple)):
        for item in found:
            yield from _schedulers(item, kind)
    elif isinstance(found, dict):
        for item in found.values():
            yield from _schedulers(item, kind)


def _changes(scheduler: _ParamScheduler, saved: dict) -> Iterator[str]:
    own = type(scheduler).__module__.startswith('mmengine.')
    own = own and not getattr(scheduler, 'need_val_args', False)
    for name, value in scheduler.state_dict().items():
        # others may keep more than settings
        settings = name not in PROGRESS if own else name in ('begin', 'end', 'by_epoch')
        before = saved.get(name)
        if settings and before != value:
            if name == 'base_values' and before:
                # one for each group of parameters, of which there may be hundreds
                pairs = zip(before, value, strict=False)
                before, value = next(pair for pair in pairs if pair[0] != pair[1])
            yield f'{type(scheduler).__name__}: {name} {before} -> {value}'


def _step(schedulers: Iterable[_ParamScheduler]) -> None:
    for scheduler in schedulers:
        scheduler.step()


def _describe(schedulers: list[_ParamScheduler]) -> str:
    values = {s.param_name: s.optimizer.param_groups[0][s.param_name] for s in schedulers}
    return ', '.join(f'{name}={value:.3g}' for name, value in values.items())
