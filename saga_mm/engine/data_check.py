"""Refuses data that a model can't be trained on, or tested."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..registry import HOOKS
from .classes import classes_of, describe_empty, fails_for_more_classes, parts_of
from .exact_resume import get_random_state, set_random_state
from .labels import (
    Limit,
    labels_of_objects,
    limits_of_maps,
    limits_of_objects,
    map_of,
    samples_of,
    unwrap,
)

# of a data set, to look at before a training
SAMPLES = 8
TOOLBOXES = ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg')
# what reading broken data may raise: the run itself will name it
UNREADABLE = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Refuses data that mmengine would wait for forever, fail on late, or be wrong with silently.

    Those are data sets without an image, classes that are no tuple of names, heads for more classes
    than can be evaluated, and labels that a head does not take. Label maps are held against
    `decode_head` or `semantic_head`, the labels of objects against the heads for boxes and masks.
    What may be meant is a warning in the log.
    """

    def __init__(self) -> None:
        self.objects: list[Limit] = []
        self.maps: list[Limit] = []
        # of the label maps in a validation or test: limits, pixels of each class, and their number
        self.evaluated: list[Limit] = []
        self.pixels = torch.zeros(0, dtype=torch.int64)
        self.number = torch.zeros(1, dtype=torch.int64)
        self.told: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        self._check_split(runner, 'train')
        self._warn_of_one_class(runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check_split(runner, 'val')
            self._look_ahead(runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        self._check_split(runner, 'val')

    def before_test(self, runner: Runner) -> None:
        self._check_split(runner, 'test')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        for sample in samples_of(data_batch):
            self._check(sample, labels_of_objects(sample), self.objects)
            self._check(sample, map_of(sample), self.maps)

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        # a training goes on
        limits = [replace(limit, strict=False) for limit in self.evaluated]
        self._check_and_count(data_batch, limits)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        self._check_and_count(data_batch, self.evaluated)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._warn_of_absent(runner.val_dataloader.dataset)

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self._warn_of_absent(runner.test_dataloader.dataset)

    def _check_split(self, runner: Runner, split: str) -> None:
        """Check a data set as a whole, and find out which labels it may have."""
        dataset = getattr(runner, f'{split}_dataloader').dataset
        if len(dataset) == 0:
            raise ValueError(f'{split}_dataloader: {describe_empty(dataset)}')
        classes = classes_of(dataset, f'{split}_dataloader')
        model = unwrap(runner.model)
        self.objects, self.maps = limits_of_objects(model), limits_of_maps(model)
        metrics: Sequence[object] = ()
        if split != 'train':
            metrics = getattr(getattr(runner, f'{split}_evaluator'), 'metrics', ())
            self.evaluated = _evaluated(metrics, self.maps, len(classes))
            self.pixels = torch.zeros(len(classes), dtype=torch.int64)
            self.number = torch.zeros(1, dtype=torch.int64)
        for limit in self.objects:
            if 0 < len(classes) < limit.number:
                problem = (
                    f'{limit.head} has num_classes={limit.number}, and {split}_dataloader has data '
                    f'of {len(classes)} ({_list(classes)}): set num_classes={len(classes)}'
                )
                if fails_for_more_classes(model, metrics):
                    raise ValueError(f'{problem}; predictions of others can not be evaluated')
                self._warn(problem)

    def _check(self, sample: BaseDataElement, labels: object, limits: Sequence[Limit]) -> None:
        if not isinstance(labels, Tensor):
            return
        if limits and labels.ndim == 3 and labels.shape[0] != 1 and labels.shape[2] in (3, 4):
            raise ValueError(
                f'a label map must have one channel, the number of the class of each pixel, got '
                f'{labels.shape[2]} channels, as of a colour image, for {_name(sample)}'
            )
        if not limits:
            self._warn('no head of the model is known to take the labels: they are not checked')
        for limit in limits:
            wrong = limit.find_wrong(labels)
            if wrong is not None:
                problem = (
                    f'labels must be from {limit}, got {wrong} for {_name(sample)}: see '
                    'num_classes and reduce_zero_label in the config'
                )
                if limit.strict:
                    raise ValueError(problem)
                self._warn(problem, once_per=str(limit))

    def _check_and_count(self, batch: object, limits: Sequence[Limit]) -> None:
        for sample in samples_of(batch) if limits else ():
            labels = map_of(sample)
            self._check(sample, labels, limits)
            if isinstance(labels, Tensor):
                self.number += 1
                values = labels[(labels >= 0) & (labels < len(self.pixels))].cpu()
                self.pixels += torch.bincount(values.long(), minlength=len(self.pixels))

    def _look_ahead(self, dataset: BaseDataset) -> None:
        """Check some samples of a validation before the training, and not only after its start."""
        state = get_random_state()
        for index in _some(len(dataset)) if self.evaluated else ():
            try:
                sample = dataset[index]['data_samples']
            except UNREADABLE:
                continue
            self._check_and_count(dict(data_samples=[sample]), self.evaluated)
        set_random_state(state)

    def _warn_of_one_class(self, dataset: BaseDataset) -> None:
        """Warn of masks of 0 and 255, which train on the background alone."""
        ignored = {value for limit in self.maps for value in limit.ignored}
        maps = list(_read_some_maps(dataset))
        found = {int(value) for labels in maps for value in np.unique(labels)}
        if found & ignored and len(found - ignored) <= 1 and max(m.number for m in self.maps) > 1:
            self._warn(
                f'the label maps that were looked at ({len(maps)}) hold no labels but '
                f'{_list(sorted(found))}, of which {_list(sorted(found & ignored))} is ignored: '
                'masks of 0 and 255, for one, must be of 0 and 1'
            )

    def _warn_of_absent(self, dataset: BaseDataset) -> None:
        """Warn of classes without a pixel, which a mean over classes leaves out."""
        if not self.evaluated:
            return
        # in each process, for a part of the data
        all_reduce(self.pixels)
        all_reduce(self.number)
        if not self.number:
            return
        classes = getattr(dataset, 'metainfo', {}).get('classes') or ()
        absent = [name for name, pixels in zip(classes, self.pixels, strict=False) if not pixels]
        if absent:
            self._warn(f'no pixel of {_list(absent)} in the label maps: the means are without them')

    def _warn(self, message: str, once_per: str | None = None) -> None:
        if (once_per or message) not in self.told:
            self.told.add(once_per or message)
            print_log(message, 'current', logging.WARNING)


def _evaluated(metrics: Sequence[object], heads: Sequence[Limit], classes: int) -> list[Limit]:
    """The labels of a validation or test that its metrics or the heads know, if any reads them."""
    read = [metric for metric in metrics if not getattr(metric, 'format_only', False)]
    values = {getattr(metric, 'ignore_index', None) for metric in read}
    ignored = {value for value in values if isinstance(value, int)}
    if not ignored or not classes:
        return []
    number = max([classes, *(limit.number for limit in heads)])
    return [Limit('evaluation', number, frozenset(ignored.union(*(x.ignored for x in heads))))]


def _read_some_maps(dataset: BaseDataset) -> Iterator[np.ndarray]:
    """Some label maps of a data set as they are loaded, if nothing changes them afterwards."""
    for part in parts_of(dataset):
        transforms = getattr(getattr(part, 'pipeline', None), 'transforms', ())
        loaders = [transform for transform in transforms if getattr(transform, 'with_seg', False)]
        known = all(type(t).__module__.partition('.')[0] in TOOLBOXES for t in transforms)
        for index in _some(len(part)) if known and loaders else ():
            try:
                yield loaders[0](part.get_data_info(index))['gt_seg_map']
            except UNREADABLE:
                continue


def _some(length: int) -> list[int]:
    """Some indices, evenly spread."""
    return sorted({i * length // SAMPLES for i in range(SAMPLES)})


def _name(sample: BaseDataElement) -> str:
    return sample.get('seg_map_path') or sample.get('img_path') or 'an image'


def _list(values: Sequence[object], number: int = 5) -> str:
    more = f' and {len(values) - number} more' if len(values) > number else ''
    return ', '.join(map(str, values[:number])) + more
