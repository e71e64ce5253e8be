"""Refuses data that a model can't be trained on, or tested."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from ..registry import HOOKS

# the parts of a model that the labels of the data are for
HEADS = {'bbox_head', 'decode_head'}


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


def describe_empty(dataset: Dataset) -> str:
    """What to say about a data set without an image."""
    names = ('ann_file', 'data_prefix', 'filter_cfg')
    given = ((name, getattr(dataset, name, None)) for name in names)
    told = ', '.join(f'{name}={value!r}' for name, value in given if value)
    classes = getattr(dataset, 'metainfo', {}).get('classes')
    return (
        'the data set must have at least one image with labels of its classes, got none from '
        f'{type(dataset).__name__}({told}) for classes={classes!r}'
    )


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
