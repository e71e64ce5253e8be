"""The preprocessors add a mask of the padding to the batches of those of mmdet and mmseg."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

SIZES = [(37, 61), (50, 33)]
NORM = dict(mean=[123.0, 116.0, 103.0], std=[58.0, 57.0, 57.0], bgr_to_rgb=True)


def det_batch(sizes=SIZES):
    samples = [
        DetDataSample(
            metainfo=dict(img_shape=size),
            gt_instances=InstanceData(bboxes=torch.tensor([[1.0, 2, 9, 8]])),
            ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
        )
        for size in sizes
    ]
    return dict(inputs=pixels(sizes), data_samples=samples)


def seg_batch(sizes=SIZES):
    samples = [
        SegDataSample(
            metainfo=dict(img_shape=size), gt_sem_seg=PixelData(data=torch.zeros(1, *size))
        )
        for size in sizes
    ]
    return dict(inputs=pixels(sizes), data_samples=samples)


def pixels(sizes):
    return [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]


def preprocess(scope, options, batch, training):
    """The batch from the preprocessor of the toolbox, and that from the masked one."""
    kinds = dict(
        mmdet=('mmdet.DetDataPreprocessor', 'saga_mm.MaskedDetDataPreprocessor'),
        mmseg=('mmseg.SegDataPreProcessor', 'saga_mm.MaskedSegDataPreprocessor'),
    )[scope]
    made = []
    for kind in kinds:
        torch.manual_seed(0)
        preprocessor = MODELS.build(dict(type=kind, **NORM, **options))
        made.append(preprocessor(copy.deepcopy(batch), training))
    assert isinstance(preprocessor, MODELS.get(kinds[0]))
    return made


def check(plain, masked, sizes):
    batch, _, height, width = plain['inputs'].shape
    assert masked['inputs'].shape == (batch, 4, height, width)
    assert masked['inputs'].dtype == plain['inputs'].dtype
    assert torch.equal(masked['inputs'][:, :3], plain['inputs'])
    for mask, (h, w) in zip(masked['inputs'][:, 3], sizes, strict=True):
        assert mask[:h, :w].all() and mask.sum() == h * w
    for a, b in zip(masked['data_samples'] or [], plain['data_samples'] or [], strict=True):
        assert a.metainfo == b.metainfo


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('divisor', [1, 32])
def test_images_of_two_sizes_for_detection(training, divisor):
    made = preprocess('mmdet', dict(pad_size_divisor=divisor), det_batch(), training)
    assert made[1]['inputs'].shape[2:] == ((50, 61) if divisor == 1 else (64, 64))
    check(*made, SIZES)


def test_batch_augmentations_of_detection():
    fixed = [dict(type='mmdet.BatchFixedSizePad', size=(80, 96))]
    check(*preprocess('mmdet', dict(batch_augments=fixed), det_batch(), True), SIZES)
    # The batch has 50 x 61 pixels.
    twice = [dict(type='mmdet.BatchResize', scale=(100, 122), pad_size_divisor=32)]
    made = preprocess('mmdet', dict(batch_augments=twice), det_batch(), True)
    assert made[1]['inputs'].shape[2:] == (128, 128)
    check(*made, [(2 * height, 2 * width) for height, width in SIZES])


def test_images_without_samples():
    made = preprocess('mmdet', {}, dict(inputs=pixels(SIZES)), False)
    check(*made, SIZES)
    same = [SIZES[0]] * 2
    check(*preprocess('mmseg', {}, dict(inputs=pixels(same)), False), same)
    check(*preprocess('mmdet', {}, dict(inputs=torch.stack(pixels(same))), False), same)


@pytest.mark.parametrize(
    ('options', 'shape'),
    [(dict(size=(64, 80)), (64, 80)), (dict(size_divisor=32), (64, 64))],
)
def test_images_of_two_sizes_for_segmentation(options, shape):
    made = preprocess('mmseg', options, seg_batch(), True)
    assert made[1]['inputs'].shape[2:] == shape
    check(*made, SIZES)


@pytest.mark.parametrize('test_cfg', [None, dict(size_divisor=32), dict(size=(70, 70))])
def test_segmentation_pads_in_testing_too(test_cfg):
    sizes = [SIZES[0]] * 2
    options = dict(size_divisor=32, test_cfg=test_cfg)
    check(*preprocess('mmseg', options, seg_batch(sizes), False), sizes)


COPY = """
import pickle, sys
preprocessor = pickle.load(sys.stdin.buffer)
# another one does not make a class of its own
pickle.dumps(preprocessor)
print(type(preprocessor).__mro__[2].__name__, preprocessor.mean.flatten().tolist())
"""


@pytest.mark.parametrize(('scope', 'name'), [('det', 'Preprocessor'), ('seg', 'PreProcessor')])
def test_copies_in_this_process_and_in_others(scope, name):
    kind = f'saga_mm.Masked{scope.title()}DataPreprocessor'
    preprocessor = MODELS.build(dict(type=kind, **NORM))
    copied = copy.deepcopy(preprocessor)
    assert type(copied) is type(preprocessor)
    assert copied(dict(inputs=pixels([SIZES[0]])))['inputs'].shape[1] == 4
    other = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', COPY],
        input=pickle.dumps(preprocessor),
        stdout=subprocess.PIPE,
        check=True,
    )
    printed = f'{scope.title()}Data{name} [123.0, 116.0, 103.0]'
    assert other.stdout.decode().splitlines()[-1] == printed


def test_unknown_options_are_errors():
    for kind in ('Det', 'Seg'):
        with pytest.raises(TypeError, match='pad_maks'):
            MODELS.build(dict(type=f'saga_mm.Masked{kind}DataPreprocessor', pad_maks=True))
