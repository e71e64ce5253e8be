from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmdet.models.seg_heads import PanopticFPNHead
from mmdet.structures import DetDataSample
from mmengine.dataset import RepeatDataset
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.models.decode_heads import FCNHead
from mmseg.models.losses import CrossEntropyLoss, DiceLoss
from mmseg.structures import SegDataSample
from torch import nn

from saga_mm.engine import DataCheckHook
from saga_mm.engine.classes import classes_of, fails_for_more_classes


class Parts(nn.Module):
    """A model, or a part of one, with attributes."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmseg')


@pytest.fixture
def said(monkeypatch):
    """The lines of the log."""
    lines = []
    monkeypatch.setattr('saga_mm.engine.data_check.print_log', lambda line, *_: lines.append(line))
    return lines


def fcn(loss='CrossEntropyLoss', **options):
    return FCNHead(
        in_channels=4,
        channels=4,
        num_convs=0,
        concat_input=False,
        loss_decode=dict(type=loss),
        **options,
    )


def boxes(number):
    return Parts(num_classes=number)


def semantic(number, **loss):
    init_default_scope('mmdet')
    loss = dict(type='CrossEntropyLoss', **loss)
    return FusedSemanticHead(num_ins=1, fusion_level=0, num_classes=number, loss_seg=loss)


def panoptic(things, stuff):
    init_default_scope('mmdet')
    loss = dict(type='CrossEntropyLoss', ignore_index=255)
    return PanopticFPNHead(num_things_classes=things, num_stuff_classes=stuff, loss_seg=loss)


def sample(labels=None, objects=None, image=None):
    """A sample with a label map, or with objects, or both; or with labels of the whole image."""
    made = DetDataSample() if objects is not None else SegDataSample()
    if image is not None:
        made.set_field(torch.tensor(image), 'gt_label')
    made.set_metainfo(dict(img_path='a.jpg'))
    if objects is not None:
        made.gt_instances = InstanceData(labels=torch.tensor(objects))
    if labels is not None:
        # mmdet and mmseg use different names for it.
        name = 'data' if objects is None else 'sem_seg'
        made.gt_sem_seg = PixelData(**{name: torch.tensor(labels).view(1, 1, -1)})
    return made


# A model, labels that it accepts, and a label that it does not.
HEADS = {
    'segmentor': (
        lambda: dict(decode_head=fcn(num_classes=3)),
        dict(labels=[0, 2, 255]),
        dict(labels=[3]),
    ),
    'own ignore': (
        lambda: dict(decode_head=fcn(num_classes=11, ignore_index=11)),
        dict(labels=[0, 10, 11]),
        dict(labels=[255]),
    ),
    'one channel': (
        lambda: dict(decode_head=fcn(num_classes=2, out_channels=1, threshold=0.5)),
        dict(labels=[0, 1, 255]),
        dict(labels=[2]),
    ),
    'one class of one channel': (
        lambda: dict(decode_head=fcn(num_classes=1, out_channels=1, threshold=0.5)),
        dict(labels=[0, 1, 255]),
        dict(labels=[2]),
    ),
    'cascade': (
        lambda: dict(decode_head=nn.ModuleList([fcn(num_classes=3), fcn(num_classes=3)])),
        dict(labels=[0, 2, 255]),
        dict(labels=[7]),
    ),
    # The model makes labels of edges by itself.
    'auxiliary head of other labels': (
        lambda: dict(
            decode_head=fcn(num_classes=9), auxiliary_head=nn.ModuleList([fcn(num_classes=2)])
        ),
        dict(labels=[8]),
        dict(labels=[9]),
    ),
    'one stage': (lambda: dict(bbox_head=boxes(2)), dict(objects=[0, 1]), dict(objects=[2])),
    # No label of this value is ignored.
    'objects have no 255': (
        lambda: dict(bbox_head=boxes(2)),
        dict(objects=[]),
        dict(objects=[255]),
    ),
    'cascade of boxes': (
        lambda: dict(roi_head=Parts(bbox_head=nn.ModuleList([boxes(80)] * 3))),
        dict(objects=[79]),
        dict(objects=[80]),
    ),
    'masks alone': (lambda: dict(mask_head=boxes(80)), dict(objects=[79]), dict(objects=[80])),
    'stuff beside objects': (
        lambda: dict(
            roi_head=Parts(bbox_head=boxes(80), semantic_head=semantic(183, ignore_index=255))
        ),
        dict(objects=[79], labels=[0, 182, 255]),
        dict(objects=[79], labels=[183]),
    ),
    'stuff with another ignored label': (
        lambda: dict(roi_head=Parts(bbox_head=boxes(2), semantic_head=semantic(3, ignore_index=9))),
        dict(objects=[1], labels=[2, 9]),
        dict(objects=[1], labels=[255]),
    ),
    'objects beside stuff': (
        lambda: dict(roi_head=Parts(bbox_head=boxes(80), semantic_head=semantic(183))),
        dict(objects=[79], labels=[182]),
        dict(objects=[80], labels=[182]),
    ),
    'panoptic': (
        lambda: dict(roi_head=Parts(bbox_head=boxes(80)), semantic_head=panoptic(80, 53)),
        dict(objects=[79], labels=[0, 132, 255]),
        dict(objects=[79], labels=[133]),
    ),
    'classifier': (lambda: dict(head=boxes(3)), dict(image=[0, 2, -100]), dict(image=[3])),
}


class RPN(Parts):
    """Like mmdet's RPN, which treats all classes as one."""


def look_at(parts, *samples):
    hook = DataCheckHook()
    data = SimpleNamespace(dataset=[0], metainfo={})
    model = parts if isinstance(parts, Parts) else Parts(**parts)
    runner = SimpleNamespace(model=model, train_dataloader=data, val_loop=None)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0, dict(data_samples=list(samples)))


@pytest.mark.parametrize('name', HEADS)
def test_labels_are_held_against_their_own_heads(name, said):
    make, taken, refused = HEADS[name]
    look_at(make(), sample(**taken))
    assert not said
    with pytest.raises(ValueError, match=r'labels must be from 0 to .* for a\.jpg'):
        look_at(make(), sample(**taken), sample(**refused))


@pytest.mark.parametrize(
    ('parts', 'labels', 'line'),
    [
        (dict(head=fcn(num_classes=2)), dict(labels=[9]), 'they are not checked'),
        (
            dict(language_model=fcn(num_classes=2), bbox_head=boxes(2)),
            dict(objects=[9]),
            'they are not',
        ),
        (RPN(bbox_head=boxes(1)), dict(objects=[9]), 'they are not checked'),
        # This loss drops labels that are not classes.
        (dict(decode_head=fcn('DiceLoss', num_classes=2)), dict(labels=[9]), 'got 9 for a.jpg'),
    ],
)
def test_what_would_train_is_a_line_in_the_log(parts, labels, line, said):
    look_at(parts, sample(**labels), sample(**labels))
    (told,) = said
    assert line in told


def test_losses_that_are_told_apart_are_as_assumed():
    logits, labels = torch.zeros(1, 2, 1, 2), torch.tensor([[[9, 0]]])
    DiceLoss()(logits, labels)
    with pytest.raises((IndexError, RuntimeError)):
        CrossEntropyLoss()(logits, labels)


@pytest.mark.parametrize(
    'batch',
    [
        None,
        [torch.ones(1)],
        dict(inputs=[]),
        dict(data_samples=dict(sup=[1])),
        dict(data_samples=[3]),
    ],
)
def test_batches_of_another_form_pass(batch):
    runner = SimpleNamespace(model=Parts(bbox_head=boxes(2)))
    DataCheckHook().before_train_iter(runner, 0, batch)


class Labelled(torch.utils.data.Dataset):
    """A data set with given label maps."""

    def __init__(self, *maps, classes=('a', 'b', 'c')):
        self.maps = maps
        self.metainfo = dict(classes=classes)

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        return dict(data_samples=sample(self.maps[index]))


def evaluate(dataset, model=None, split='test', batch_of=lambda sample: [sample], **metric):
    metric = SimpleNamespace(**dict(ignore_index=255) | metric)
    runner = SimpleNamespace(
        model=model or Parts(decode_head=fcn(num_classes=3)),
        **{
            f'{split}_dataloader': SimpleNamespace(dataset=dataset),
            f'{split}_evaluator': SimpleNamespace(metrics=[metric]),
        },
    )
    hook = DataCheckHook()
    getattr(hook, f'before_{split}')(runner)
    for index in range(len(dataset)):
        batch = dict(data_samples=batch_of(dataset[index]['data_samples']))
        getattr(hook, f'before_{split}_iter')(runner, index, batch)
    getattr(hook, f'after_{split}_epoch')(runner)


def test_classes_without_a_pixel_are_told(said):
    evaluate(Labelled([0, 1], [2, 255]))
    assert not said
    evaluate(Labelled([0, 0], [2, 255]))
    evaluate(Labelled([255]), split='val')
    assert 'no pixel of b in the label maps' in said[0]
    assert 'no pixel of a, b, c in the label maps' in said[1]


def test_augmented_samples_are_counted_once(said):
    def augment(sample):
        return [[sample], [sample]]

    evaluate(Labelled([0, 1], [2, 255]), batch_of=augment)
    assert not said
    with pytest.raises(ValueError, match='got 77'):
        evaluate(Labelled([0, 1, 2, 77]), batch_of=augment)
    # of another form
    evaluate(Labelled([0, 1]), batch_of=lambda sample: dict(sup=[sample]))
    assert not said


def test_labels_that_are_evaluated(said):
    # The ignored label of either head.
    evaluate(
        Labelled([0, 1, 2, 11, 9]),
        Parts(decode_head=fcn(num_classes=3, ignore_index=11)),
        ignore_index=9,
    )
    # not read
    evaluate(Labelled([77]), format_only=True)
    # They are classes that the model does not know.
    evaluate(Labelled([0, 1, 2]), Parts(decode_head=fcn(num_classes=2)))
    assert not said
    with pytest.raises(ValueError, match=r'labels must be from 0 to 2 .* got 77 for a\.jpg'):
        evaluate(Labelled([0, 1, 2, 77]))
    # a training goes on
    evaluate(Labelled([0, 1, 2, 77], [77]), split='val')
    assert len(said) == 1
    assert 'got 77' in said[0]


def test_a_text_is_no_classes():
    with pytest.raises(ValueError, match=r"test_dataloader: metainfo.classes must be .* \('ab',\)"):
        evaluate(Labelled([0], classes='ab'))
    assert classes_of(Labelled([0], classes=('ab',)), 'a') == ('ab',)
    assert classes_of(['no', 'metainfo'], 'a') == ()


@pytest.mark.parametrize(
    ('test_cfg', 'fails'),
    [
        (None, True),
        (dict(max_per_img=100), True),
        (dict(score_thr=0.0), True),
        (dict(score_thr=0.05), False),
        (dict(rpn=dict(nms_pre=1), rcnn=dict(score_thr=0.05)), False),
    ],
)
def test_more_classes_than_the_data_are_refused_where_they_must_fail(test_cfg, fails):
    model = Parts(bbox_head=boxes(80), test_cfg=test_cfg)
    assert fails_for_more_classes(model, [SimpleNamespace(cat_ids=None)]) is fails
    assert not fails_for_more_classes(model, [SimpleNamespace()])


class Remap(BaseTransform):
    """A user's transform, which maps the values in the files to classes."""

    def transform(self, results):
        return results


MASKS = {
    'masks': ([[0, 255]] * 3, {}, True),
    'nothing': ([[255, 255]], {}, True),
    'two classes': ([[0, 255], [0, 1]], {}, False),
    'no ignored pixel': ([[0, 0]], {}, False),
    'one class': ([[0, 255]], dict(num_classes=1, out_channels=1, threshold=0.5), True),
    'own transform': ([[0, 255]], dict(transform=Remap()), False),
    'other ignored label': ([[0, 7]], dict(ignore_index=7), True),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks_of_one_class_are_told_before_training(tmp_path, said, name):
    maps, options, told = MASKS[name]
    transforms = [
        dict(type='LoadAnnotations'),
        options.pop('transform', dict(type='RandomFlip', prob=0.5)),
    ]
    for i, labels in enumerate(maps):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.array([labels], np.uint8))
        (tmp_path / f'{i}.jpg').touch()
    dataset = BaseSegDataset(
        data_root=str(tmp_path),
        data_prefix=dict(img_path='.', seg_map_path='.'),
        metainfo=dict(classes=('a', 'b')),
        pipeline=transforms,
    )
    head = fcn(**dict(num_classes=2) | options)
    runner = SimpleNamespace(
        model=Parts(decode_head=head),
        train_dataloader=SimpleNamespace(dataset=RepeatDataset(dataset, times=2)),
        val_loop=None,
    )
    DataCheckHook().before_train(runner)
    assert bool(said) is told
    if told:
        assert 'masks of 0 and 255, for one, must be of 0 and 1' in said[0]
