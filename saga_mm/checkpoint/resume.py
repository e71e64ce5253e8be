"""Finds the checkpoint that a training is resumed from, and checks what it takes from there.

Apart from the weights, a checkpoint holds the state of the training: step numbers, names of files
to remove, options and state of the optimizer, logs. mmengine, torch and numpy use it unchecked, so
it is checked here.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.optim import _ParamScheduler as Scheduler
from torch import Tensor
from torch.optim import Optimizer

from .errors import CheckpointError
from .loading import load_file


def latest_checkpoint(work_dir: str | Path) -> str:
    """The checkpoint to resume from: the one that `last_checkpoint` names.

    If that one can't be resumed, it is the newest one in the folder that can, and the log says so.

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


def _problem(path: str | Path) -> str:
    """Why a checkpoint can't be resumed; empty if it can."""
    try:
        missing = missing_for_resume(load_file(path))
    except CheckpointError as error:
        return str(error)
    return f'{path} holds no {", ".join(missing)}' if missing else ''


def missing_for_resume(checkpoint: Mapping) -> list[str]:
    """The entries that a resume needs and that this checkpoint does not have."""
    return sorted({'meta', 'message_hub', 'optimizer'} - checkpoint.keys())


def check_training_state(checkpoint: Mapping, file: str | Path) -> None:
    """Check the type and the range of the state that a resume takes from a checkpoint.

    Args:
        checkpoint: With all that `missing_for_resume` asks for.
        file: Its name, for the error.

    Raises:
        CheckpointError: An entry is wrong. The message is one line and names the entry.
    """
    for where, value, rule in _training_state(checkpoint):
        if not rule.holds(value):
            raise CheckpointError(
                f'{file} can not be resumed: {where} must be {rule.words}, got '
                f'{reprlib.repr(value)}'
            )


def check_groups(optimizers: Mapping[str, Optimizer], state: Mapping, file: str | Path) -> None:
    """Check that optimizers are those of a checkpoint, with as many groups of parameters.

    Args:
        optimizers: The optimizers that are to take the state, by name; that of a single one is ''.
        state: Their state, as `check_training_state` lets it pass.
        file: Name of the checkpoint, for the error.

    Raises:
        CheckpointError: The names or numbers differ. The message is one line.
    """
    states = {'': state} if 'param_groups' in state else state
    if states.keys() != optimizers.keys():
        names = ['one without a name' if '' in x else sorted(x) for x in (optimizers, states)]
        raise CheckpointError(
            f'{file} can not be resumed: its optimizers must be those of the config, {names[0]}, '
            f'got {names[1]}'
        )
    for name, optimizer in optimizers.items():
        own, found = len(optimizer.param_groups), len(states[name]['param_groups'])
        if own != found:
            each = sum(len(group['params']) for group in optimizer.param_groups)
            remedy = (
                '; with optim_wrapper.constructor=DefaultOptimWrapperConstructor, it has one for '
                'each parameter'
            )
            raise CheckpointError(
                f'{file} can not be resumed: the optimizer must have {own} groups of parameters, '
                f'as that of the config, got {found}{remedy if found == each else ""}'
            )


def check_fused_state(optimizer: Optimizer, file: str | Path) -> None:
    """Check the shapes of an optimizer's state for fused kernels, which do not check them.

    A checkpoint decides whether an optimizer is fused, since its options are restored from there.

    Args:
        optimizer: With the state from the checkpoint.
        file: Name of the checkpoint, for the error.

    Raises:
        CheckpointError: As in `check_training_state`.
    """
    for group in optimizer.param_groups:
        for parameter in group['params'] if group.get('fused') else ():
            for name, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.shape not in (parameter.shape, ()):
                    raise CheckpointError(
                        f'{file} can not be resumed: {name} in the state of the optimizer must '
                        f'have the shape {tuple(parameter.shape)} of its parameter, got '
                        f'{tuple(value.shape)}'
                    )


class Rule(NamedTuple):
    """What a value must be, in words and as a function."""

    words: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, int | np.integer)
        and not isinstance(value, bool)
        and bool(0 <= value < 2**63)
    )


def _is_key(value: Any) -> bool:
    return _is_count(value) or isinstance(value, str)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        if value.is_meta or value.is_complex() or value.numel() != 1:
            return False
        value = value.item()
    return isinstance(value, float | int | np.number) and not math.isnan(value)


def _is_option(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and all(_is_option(item, depth - 1) for item in value)
    return value is None or isinstance(value, str) or _is_number(value)


def _has_memory(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return True
    if value.layout is not torch.strided:
        return False
    end = (value.storage_offset() + value.numel()) * value.element_size()
    return end <= value.untyped_storage().nbytes()


def _is_best(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, str) and re.split(r'[/\\]', value)[-1].startswith('best_')


def _is_list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


ANYTHING = Rule('anything', lambda value: True)
# mmengine removes this file when it saves a better checkpoint
BEST = Rule("the path of a 'best_...' file", _is_best)
COUNT = Rule('a whole number from 0 on', _is_count)
COUNTS = Rule('a list of whole numbers from 0 on', _is_list_of(_is_count))
DICT = Rule('a dict', lambda value: isinstance(value, dict))
KEY = Rule('a whole number or a name', _is_key)
KEYS = Rule('a list of whole numbers or names', _is_list_of(_is_key))
LIST = Rule('a list', lambda value: isinstance(value, list))
# fused kernels read as many elements as the shape says
MEMORY = Rule('a tensor that is dense and not expanded', _has_memory)
# the name is printed in logs
NAME = Rule('printable text', lambda value: isinstance(value, str) and value.isprintable())
NUMBER = Rule('a number', _is_number)
OPTION = Rule('a number, a name, or several', _is_option)
RATE = Rule('a number from 0 on', lambda value: _is_number(value) and 0 <= value < float('inf'))
# a scheduler sets attributes of these names, which would also replace its methods
ATTRIBUTE = Rule(
    'the name of a value',
    lambda value: isinstance(value, str) and value != 'optimizer' and not hasattr(Scheduler, value),
)
SEED = Rule(
    'a whole number below 2**32',
    lambda value: value is None or (_is_count(value) and value < 2**32),
)
STEP = Rule('a whole number from -1 on', lambda value: _is_number(value) and _is_count(value + 1))
TEXT = Rule('text', lambda value: isinstance(value, str))
YES_NO = Rule('True or False', lambda value: isinstance(value, bool))

META = {'epoch': COUNT, 'iter': COUNT, 'seed': SEED}
HUB = {'log_scalars': DICT, 'resumed_keys': DICT, 'runtime_info': DICT}
# by the start of the name, since there may be one entry per metric
INFO = {'keep_ckpt_ids': COUNTS, 'best_ckpt': BEST, 'best_score': NUMBER}
OPTIMIZER = {'param_groups': LIST, 'state': DICT, 'loss_scaler': DICT}
GROUP = {'params': KEYS, 'lr': RATE}
SCHEDULER = {'last_step': STEP, '_global_step': COUNT, 'anneal_func': ANYTHING}

# where a value is, the value, and what it must be
Field = tuple[str, Any, Rule]


def _training_state(checkpoint: Mapping) -> Iterator[Field]:
    """The entries of a checkpoint that a training uses.

    A container comes before its content, which is read only after the container has been checked.
    """
    yield from _entries('meta', checkpoint['meta'], TEXT, ANYTHING, META)
    hub = checkpoint['message_hub']
    yield from _entries('message_hub', hub, TEXT, ANYTHING, HUB)
    yield from _entries('message_hub.log_scalars', hub.get('log_scalars', {}), NAME, ANYTHING)
    yield from _entries('message_hub.resumed_keys', hub.get('resumed_keys', {}), TEXT, YES_NO)
    info = hub.get('runtime_info', {})
    rules = {name: rule for name in info for start, rule in INFO.items() if _starts(name, start)}
    yield from _entries('message_hub.runtime_info', info, TEXT, ANYTHING, rules)
    yield from _optimizers('optimizer', checkpoint['optimizer'])
    yield from _schedulers('param_schedulers', checkpoint.get('param_schedulers', []))


def _optimizers(where: str, state: Any) -> Iterator[Field]:
    yield where, state, DICT
    if state and 'param_groups' not in state:
        # several, by name
        for name, one in state.items():
            yield f'a name in {where}', name, TEXT
            yield from _optimizer(f'{where}.{name}', one)
    else:
        yield from _optimizer(where, state)


def _optimizer(where: str, state: Any) -> Iterator[Field]:
    yield from _entries(where, state, TEXT, ANYTHING, OPTIMIZER)
    for i, group in enumerate(state.get('param_groups', [])):
        yield from _entries(f'{where}.param_groups[{i}]', group, TEXT, OPTION, GROUP)
    for key, values in state.get('state', {}).items():
        yield f'a name in {where}.state', key, KEY
        yield from _entries(f'{where}.state[{key}]', values, TEXT, MEMORY)
    yield from _entries(f'{where}.loss_scaler', state.get('loss_scaler', {}), TEXT, OPTION)


def _schedulers(where: str, schedulers: Any) -> Iterator[Field]:
    if isinstance(schedulers, dict):
        # those of several optimizers
        for name, several in schedulers.items():
            yield f'a name in {where}', name, TEXT
            yield from _schedulers(f'{where}.{name}', several)
        return
    yield where, schedulers, LIST
    for i, state in enumerate(schedulers):
        yield from _entries(f'{where}[{i}]', state, ATTRIBUTE, OPTION, SCHEDULER)


def _entries(
    where: str, value: Any, name_rule: Rule, rule: Rule, rules: Mapping[str, Rule] = {}
) -> Iterator[Field]:
    """A dict, its names, and its values: by `rules`, which go by name, or else by `rule`."""
    yield where, value, DICT
    for name, item in value.items():
        yield f'a name in {where}', name, name_rule
        yield f'{where}.{name}', item, rules.get(name, rule)


def _starts(name: Any, start: str) -> bool:
    return isinstance(name, str) and name.startswith(start)
