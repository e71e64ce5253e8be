"""Hooks that tools/train.py and tools/test.py add to every run."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import Sampler

from ..registry import HOOKS
from .checkpoint import (
    CheckpointError,
    match_weights,
    missing_for_resume,
    state_dict,
    translate,
)
from .data import describe_empty

# the parts of a model that the labels of the data are for
HEADS = {'bbox_head', 'decode_head'}


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
        elif self.resumed['sampler'] is not None:
            # a config without a seed got another one, and so another order of the data
            _sampler(runner).seed = self.resumed['sampler']

    def before_train_epoch(self, runner: Runner) -> None:
        if self.resumed is None:
            return
        state, self.resumed = self.resumed, None
        loop = runner.train_loop
        iterator = getattr(loop, 'dataloader_iterator', None)
        if isinstance(loop, IterBasedTrainLoop) and not hasattr(iterator, 'skip_iter'):
            loop.dataloader_iterator = _restore_after(iterator, loop.iter, state)
        else:
            set_random_state(state)

    def before_val(self, runner: Runner) -> None:
        self.before_validation = get_random_state()

    def after_val(self, runner: Runner) -> None:
        set_random_state(self.before_validation)
        self.before_validation = None


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Refuses a checkpoint that does not fit the model, where mmengine only warns.

    Args:
        complete (bool): Each weight of the model must be in the file, with its shape, as for tests
            and for a resume. Else one is enough, as for training that starts from other weights.
        resume (bool): The file must also hold what a resume needs.
    """

    def __init__(self, complete: bool, resume: bool = False) -> None:
        self.complete = complete
        self.resume = resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        file = runner.cfg.get('load_from') or 'the latest checkpoint'
        if self.resume and (missing := missing_for_resume(checkpoint)):
            raise CheckpointError(
                f'{file} can not be resumed: it holds weights, but no {", ".join(missing)}; '
                'to start a new training from it, set load_from'
            )
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        match = match_weights(model, translate(model, state_dict(checkpoint)))
        if not match.loaded or (self.complete and (match.missing or match.mismatched)):
            raise CheckpointError(f'{file} does not fit the model of the config, weights: {match}')
        print_log(f'{file}, weights: {match}', 'current')


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Refuses data that mmengine would wait for forever, or that ends in an error on the GPU.

    Those are data sets without an image, and labels that the model has no class for.
    """

    def before_train(self, runner: Runner) -> None:
        check_not_empty(runner, 'train')
        if runner.val_loop is not None:
            check_not_empty(runner, 'val')

    def before_test(self, runner: Runner) -> None:
        check_not_empty(runner, 'test')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict) -> None:
        numbers = [
            module.num_classes
            for name, module in runner.model.named_modules()
            if {'decode_head', 'bbox_head'} & set(name.split('.'))
            and hasattr(module, 'num_classes')
        ]
        if numbers:
            for sample in data_batch['data_samples']:
                check_labels(sample, max(numbers))


def check_not_empty(runner: Runner, split: str) -> None:
    """ValueError if the data set of a split ('train', 'val' or 'test') is empty."""
    dataset = getattr(runner, f'{split}_dataloader').dataset
    if len(dataset) == 0:
        raise ValueError(f'{split}_dataloader: {describe_empty(dataset)}')


def check_labels(sample: object, num_classes: int) -> None:
    """ValueError if a sample of mmdet or mmseg has a label from `num_classes` on, but 255."""
    labels = []
    if 'gt_sem_seg' in sample:
        labels.append(sample.gt_sem_seg.data)
    if 'gt_instances' in sample and 'labels' in sample.gt_instances:
        labels.append(sample.gt_instances.labels)
    for values in labels:
        wrong = values[((values < 0) | (values >= num_classes)) & (values != 255)]
        if len(wrong):
            file = getattr(sample, 'seg_map_path', None) or getattr(sample, 'img_path', 'an image')
            raise ValueError(
                f'labels must be from 0 to {num_classes - 1} for the model (or 255 to be ignored), '
                f'got {wrong[0]} for {file}: see num_classes and reduce_zero_label in the config'
            )


def get_random_state() -> dict:
    """State of the generators of torch, the current CUDA device, numpy and Python."""
    _, keys, *position = np.random.get_state()
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        'numpy': (keys.tolist(), *position),
        'python': random.getstate(),
    }


def set_random_state(state: dict) -> None:
    """Put back a state of `get_random_state`; its tensors may have moved to another device."""
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
    np.random.set_state(('MT19937', *state['numpy']))
    random.setstate(state['python'])


def _sampler(runner: Runner) -> Sampler | None:
    # a batch sampler of mmdet takes the place of `dataloader.sampler`
    return getattr(runner.train_dataloader.batch_sampler, 'sampler', None)


def _restore_after(batches: Iterator, number: int, state: dict) -> Iterator:
    # the original mmengine skips data by loading it, and so draws numbers
    for _ in range(number):
        yield next(batches)
    set_random_state(state)
    yield from batches
