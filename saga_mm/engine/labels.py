"""The labels of samples, and which of them the heads of a model take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

# losses that fail for a label which is no class; others cut it off
STRICT_LOSSES = ('CrossEntropy', 'Focal')


@dataclass(frozen=True)
class Limit:
    """The labels that a head takes: 0 to `number - 1`, and those that it ignores."""

    head: str
    number: int
    ignored: frozenset[int] = frozenset()
    # whether others end in an error
    strict: bool = True

    def find_wrong(self, labels: Tensor) -> int | None:
        """A label that the head does not take, if there is one."""
        wrong = (labels < 0) | (labels >= self.number)
        for value in self.ignored:
            wrong &= labels != value
        found = labels[wrong]
        return int(found[0]) if len(found) else None

    def __str__(self) -> str:
        ignored = ' or '.join(map(str, sorted(self.ignored)))
        return f'0 to {self.number - 1} for the {self.head}' + (
            f' (or {ignored} to be ignored)' if ignored else ''
        )


def unwrap(model: nn.Module) -> nn.Module:
    """A model out of what distributes it or augments its tests."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.get_submodule('module')
    return model


def limits_of_objects(model: nn.Module) -> list[Limit]:
    """What the heads of a detector take as labels of objects, or that of a classifier for images.

    None where labels are words, or count for nothing, as in a region proposal network.
    """
    if hasattr(model, 'language_model') or 'RPN' in (base.__name__ for base in type(model).__mro__):
        return []
    heads = [*_heads(model, 'bbox_head'), *_heads(model, 'mask_head')]
    heads += [*_heads(model, 'panoptic_head'), *_heads(_roi_head(model), 'bbox_head')]
    heads += _heads(model, 'head')
    # torch's cross entropy, which the heads of classifiers call, leaves out -100
    ignored = {'head': frozenset([-100])}
    numbers = ((name, _number(head, 'num_classes')) for name, head in heads)
    return [
        Limit(name, number, ignored.get(name, frozenset()))
        for name, number in numbers
        if number is not None
    ]


def limits_of_maps(model: nn.Module) -> list[Limit]:
    """What the heads of a segmentor, or the semantic head of a detector, take in label maps."""
    found = []
    for name, head in _heads(model, 'decode_head'):
        number, ignored = _number(head, 'num_classes'), _number(head, 'ignore_index')
        if number is not None and ignored is not None:
            losses = [type(loss).__name__ for _, loss in _heads(head, 'loss_decode')]
            strict = not losses or any(kind in loss for loss in losses for kind in STRICT_LOSSES)
            if _number(head, 'out_channels') == 1:
                # one channel tells two classes apart
                number = max(number, 2)
            found.append(Limit(name, number, frozenset([ignored]), strict))
    for name, head in [*_heads(model, 'semantic_head'), *_heads(_roi_head(model), 'semantic_head')]:
        number, things = _number(head, 'num_classes'), _number(head, 'num_things_classes')
        if things is not None:
            number = things + (_number(head, 'num_stuff_classes') or 0)
        loss = getattr(head, 'criterion', None) or getattr(head, 'loss_seg', None)
        ignored = _number(loss, 'ignore_index')
        if number is not None:
            found.append(Limit(name, number, frozenset([] if ignored is None else [ignored])))
    return found


def labels_of_objects(sample: BaseDataElement) -> Tensor | None:
    """Labels of the objects in a sample of mmdet, or of an image of mmpretrain, shape (labels,)."""
    if 'gt_label' in sample:
        return sample.get('gt_label')
    objects = sample.get('gt_instances')
    return objects.get('labels') if isinstance(objects, BaseDataElement) else None


def map_of(sample: BaseDataElement) -> Tensor | None:
    """The label map of a sample of mmseg or mmdet, shape (1, H, W)."""
    pixels = sample.get('gt_sem_seg')
    if not isinstance(pixels, BaseDataElement):
        return None
    return pixels.get('data') if 'data' in pixels else pixels.get('sem_seg')


def samples_of(batch: object) -> list[BaseDataElement]:
    """The samples of a batch of mmdet or mmseg; none of another batch."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    # augmented tests have a list for each augmentation
    if isinstance(samples, (list, tuple)) and samples and isinstance(samples[0], (list, tuple)):
        samples = samples[0]
    if not isinstance(samples, (list, tuple)):
        return []
    return [sample for sample in samples if isinstance(sample, BaseDataElement)]


def _roi_head(model: nn.Module) -> nn.Module | None:
    return getattr(model, 'roi_head', None)


def _heads(owner: nn.Module | None, name: str) -> Iterator[tuple[str, nn.Module]]:
    """A part of this name, or the parts in a list of this name."""
    part = getattr(owner, name, None)
    for one in part if isinstance(part, nn.ModuleList) else [part]:
        if isinstance(one, nn.Module):
            yield name, one


def _number(head: object, name: str) -> int | None:
    value = getattr(head, name, None)
    return value if isinstance(value, int) else None
