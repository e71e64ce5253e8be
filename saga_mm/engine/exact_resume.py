"""Lets a resumed run go on as an uninterrupted one."""

from __future__ import annotations

import math
import random
import reprlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import Sampler

from ..checkpoint import CheckpointError
from ..registry import HOOKS

# seed and offset of torch's generator for a GPU
CUDA_BYTES = 16


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Lets a resumed run draw the random numbers of an uninterrupted one.

    mmengine restores weights, optimizer and the place in the data, but no random state: dropout,
    stochastic depth and augmentation go on differently after a resume. This hook keeps the states
    of torch, CUDA, numpy and Python in each checkpoint, and puts them back once the data that has
    been trained on is skipped. Validation leaves them as they were: a resume does not repeat it.

    That makes a resume exact where the main process loads the data (`num_workers=0`); workers of a
    dataloader draw their own numbers. All processes of a distributed run get the state of the
    first, as they all start from one seed. `EpochBasedTrainLoop` resumes only where an epoch ends.
    """

    def __init__(self) -> None:
        self.resumed: dict | None = None
        self.before_validation: dict | None = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # the best checkpoint is saved during validation
        state = self.before_validation or get_random_state()
        seed = getattr(_sampler(runner), 'seed', None)
        checkpoint['random_state'] = {**state, 'sampler': seed}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.resumed = checkpoint.get('random_state')

    def before_train(self, runner: Runner) -> None:
        # a new iterator draws a number for its workers: not from the global state
        runner.train_dataloader.generator = torch.Generator().manual_seed(runner.seed)
        if runner.iter == 0:
            # a new run, maybe with the weights of another one
            self.resumed = None
        elif self.resumed is None:
            print_log('no random state in the checkpoint: the resume is not exact', 'current')
        else:
            check_random_state(self.resumed)
            sampler = _sampler(runner)
            if sampler is not None and self.resumed['sampler'] is not None:
                # a config without a seed got another one, and so another order of the data
                vars(sampler)['seed'] = self.resumed['sampler']

    def before_train_epoch(self, runner: Runner) -> None:
        if self.resumed is None:
            return
        state, self.resumed = self.resumed, None
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop) and not hasattr(
            loop.dataloader_iterator, 'skip_iter'
        ):
            loop.dataloader_iterator = _restore_after(loop.dataloader_iterator, loop.iter, state)
        else:
            set_random_state(state)

    def before_val(self, runner: Runner) -> None:
        self.before_validation = get_random_state()

    def after_val(self, runner: Runner) -> None:
        if self.before_validation is not None:
            set_random_state(self.before_validation)
        self.before_validation = None


def get_random_state() -> dict:
    """State of the generators of torch, the current CUDA device, numpy and Python."""
    state = np.random.get_state(legacy=False)
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        'numpy': (
            state['state']['key'].tolist(),
            state['state']['pos'],
            state['has_gauss'],
            state['gauss'],
        ),
        'python': random.getstate(),
    }


def set_random_state(state: dict) -> None:
    """Put back a state of `get_random_state`; its tensors may have moved to another device."""
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
    np.random.set_state(('MT19937', *state['numpy']))
    random.setstate(state['python'])


def check_random_state(state: object) -> None:
    """Check a random state from a checkpoint: numpy does not check the position in its state.

    Args:
        state: Should be that of `get_random_state` with the seed of the sampler.

    Raises:
        CheckpointError: It is not.
    """
    match state:
        case {
            'torch': Tensor() as torch_state,
            'cuda': None | Tensor() as cuda_state,
            'numpy': (list(keys), int(position), int(has_gauss), float(gauss)),
            'python': (3, tuple(numbers), None | float() as next_gauss),
            'sampler': None | int() as seed,
        }:
            right = [
                _is_bytes(torch_state, len(torch.get_rng_state())),
                cuda_state is None or _is_bytes(cuda_state, CUDA_BYTES),
                _are_in_range(keys, 624, 2**32) and 0 <= position <= 624,
                has_gauss in (0, 1) and math.isfinite(gauss),
                _are_in_range(numbers, 625, 2**32) and numbers[-1] <= 624,
                next_gauss is None or math.isfinite(next_gauss),
                seed is None or 0 <= seed < 2**63,
            ]
            if all(right):
                return
    raise CheckpointError(
        'the checkpoint can not be resumed: its random_state must hold states of the generators of '
        f'torch, CUDA, numpy and Python and the seed of a sampler, got {reprlib.repr(state)}'
    )


def _is_bytes(state: Tensor, number: int) -> bool:
    return state.dtype == torch.uint8 and state.shape == (number,) and state.is_contiguous()


def _are_in_range(numbers: Sequence, length: int, end: int) -> bool:
    return len(numbers) == length and all(type(n) is int and 0 <= n < end for n in numbers)


def _sampler(runner: Runner) -> Sampler | None:
    # a batch sampler of mmdet takes the place of `dataloader.sampler`
    return getattr(runner.train_dataloader.batch_sampler, 'sampler', None)


def _restore_after(batches: Iterator, number: int, state: dict) -> Iterator:
    # the original mmengine skips data by loading it, and so draws numbers
    for _ in range(number):
        yield next(batches)
    set_random_state(state)
    yield from batches
