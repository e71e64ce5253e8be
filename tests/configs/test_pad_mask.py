"""A detector and a segmentor with masked padding, on batches of images of different sizes."""

from __future__ import annotations

import math

import pytest
import torch

from harness import rms_ratio

SIZES = [(64, 90), (50, 96)]


@pytest.fixture
def mixed_batch(make_batch):
    """Images of two sizes with random truth."""

    def make(scope: str, num_classes: int) -> dict:
        batches = [make_batch(scope, num_classes, *size) for size in SIZES]
        return {key: [batch[key][i] for i, batch in enumerate(batches)] for key in batches[0]}

    return make


@pytest.fixture
def check_training(mixed_batch, train_step, head_classes):
    """Run a training step, and compare the maps of each image with those that it gets alone."""

    def check(cfg, model):
        batch = mixed_batch(cfg.default_scope, head_classes(cfg.model))
        model.eval()
        with torch.no_grad():
            inputs = model.data_preprocessor(clone(batch), True)['inputs']
            maps = model.backbone(inputs)
            for i, (h, w) in enumerate(SIZES):
                alone = model.backbone(inputs[i : i + 1, :, :h, :w])
                for padded, truth in zip(maps, alone, strict=True):
                    height, width = truth.shape[2:]
                    assert rms_ratio(padded[i, :, :height, :width], truth[0].double()) < 1e-5
        losses = train_step(model, clone(batch))
        assert all(math.isfinite(value) for value in losses.values()), losses
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without

    return check


def clone(batch):
    return dict(
        inputs=list(batch['inputs']), data_samples=[x.clone() for x in batch['data_samples']]
    )


def test_detector(load_config, build_model, mixed_batch, head_classes, check_training):
    cfg = load_config('detection/mask_rcnn_saga_t_padmask.py')
    model = build_model(cfg)
    check_training(cfg, model)
    batch = mixed_batch('mmdet', head_classes(cfg.model))
    model.eval()
    with torch.no_grad():
        samples = model(**model.data_preprocessor(batch), mode='predict')
    assert len(samples) == 2
    assert all(sample.pred_instances.bboxes.isfinite().all() for sample in samples)


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_segmentor(mode, load_config, build_model, make_batch, head_classes, check_training):
    cfg = load_config('segmentation/upernet_saga_t_padmask.py')
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    cfg.model.test_cfg = dict(mode=mode, crop_size=(32, 32), stride=(32, 32))
    model = build_model(cfg)
    if mode == 'whole':
        check_training(cfg, model)
    classes = head_classes(cfg.model)
    batch = make_batch('mmseg', classes, *SIZES[0])
    model.eval()
    with torch.no_grad():
        samples = model(**model.data_preprocessor(batch), mode='predict')
    for sample in samples:
        assert sample.seg_logits.data.shape == (classes, *SIZES[0])
        assert sample.seg_logits.data.isfinite().all()


def test_segmentor_with_test_time_augmentation(load_config, build_model, make_batch):
    from mmseg.models import SegTTAModel

    cfg = load_config('segmentation/upernet_saga_t_padmask.py')
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    model = SegTTAModel(build_model(cfg)).eval()
    views = [make_batch('mmseg', 150, *size) for size in SIZES]
    for view, flip in zip(views, (False, True), strict=True):
        for sample in view['data_samples']:
            sample.set_metainfo(
                dict(flip=flip, flip_direction='horizontal', ori_shape=SIZES[0], img_path='')
            )
    with torch.no_grad():
        samples = model.test_step({key: [view[key] for view in views] for key in views[0]})
    assert [sample.pred_sem_seg.shape for sample in samples] == [SIZES[0]] * 2
