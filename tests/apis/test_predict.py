"""Predictions on image files agree with those of the test pipeline of the config."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from saga_mm.apis import Predictor, build_model, to_8_bit
from saga_mm.apis.predict import _detection_drawer, _segmentation_drawer, complete_classes

CLASSES = ('cat', 'dog')
HEIGHT, WIDTH = 40, 56


def segmentation(bands, load, **head):
    """Config of a small segmentor for images with a number of bands and values up to 60000."""
    return Config(
        dict(
            default_scope='mmseg',
            model=dict(
                type='EncoderDecoder',
                data_preprocessor=dict(type='SegDataPreProcessor', mean=[30000.0], std=[9000.0]),
                backbone=dict(
                    type='saga_mm.SAGA',
                    arch=dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2)),
                    in_channels=bands,
                    out_indices=(0, 1),
                ),
                decode_head=dict(
                    type='FCNHead',
                    in_channels=16,
                    channels=16,
                    num_convs=0,
                    concat_input=False,
                    **dict(num_classes=2) | head,
                ),
                test_cfg=dict(mode='whole'),
            ),
            test_dataloader=dict(
                dataset=dict(
                    type='ConcatDataset',
                    datasets=[
                        dict(
                            type='BaseSegDataset',
                            metainfo=dict(classes=CLASSES, palette=[[0, 0, 0], [255, 0, 0]]),
                            pipeline=[
                                load,
                                dict(type='Resize', scale=(112, 80)),
                                dict(type='LoadAnnotations'),
                                dict(type='PackSegInputs'),
                            ],
                        )
                    ],
                )
            ),
        )
    )


UNCHANGED = dict(type='LoadImageFromFile', color_type='unchanged', to_float32=True)
# The loading transform, and the bands, dtype and suffix of the images.
IMAGES = {
    'grey, 16 bits': (dict(UNCHANGED), 1, np.uint16, '.png'),
    'colour, 16 bits': (dict(UNCHANGED), 3, np.uint16, '.png'),
    'four bands, 16 bits': (dict(UNCHANGED, imdecode_backend='cv2'), 4, np.uint16, '.tif'),
    'colour, floats': (dict(UNCHANGED), 3, np.float32, '.tif'),
    'six bands': (dict(UNCHANGED, imdecode_backend='tifffile'), 6, np.uint16, '.tif'),
}


@pytest.mark.parametrize('name', IMAGES)
def test_images_are_loaded_as_the_config_does(tmp_path, name):
    load, bands, dtype, suffix = IMAGES[name]
    path = tmp_path / f'image{suffix}'
    image = np.random.default_rng(0).integers(0, 60000, (HEIGHT, WIDTH, bands)).astype(dtype)
    if bands > 4:
        tifffile = pytest.importorskip('tifffile')
        tifffile.imwrite(path, image, photometric='minisblack')
    else:
        assert cv2.imwrite(str(path), image)
    cfg = segmentation(bands, load)
    model = build_model(cfg)
    model.cfg, model.dataset_meta = cfg, dict(classes=CLASSES)
    prediction = Predictor(model)(path)

    dataset = cfg.test_dataloader.dataset.datasets[0]
    del dataset.pipeline[2]
    cv2.imwrite(str(tmp_path / 'other.png'), image[..., 0])
    dataset.update(data_prefix=dict(img_path=str(tmp_path)), img_suffix=suffix, test_mode=True)
    samples = {item['data_samples'].img_path: item for item in DATASETS.build(dataset)}
    with torch.no_grad():
        (expected,) = model.test_step(pseudo_collate([samples[str(path)]]))
    logits = prediction.sample.seg_logits.data
    torch.testing.assert_close(logits, expected.seg_logits.data)
    assert logits.shape == (2, HEIGHT, WIDTH)
    assert prediction.picture.shape == (HEIGHT, WIDTH, 3)
    assert prediction.picture.std() > 20


@pytest.mark.parametrize(
    ('head', 'classes', 'names'),
    [
        (dict(out_channels=1), CLASSES, {'cat', 'dog'}),
        (dict(num_classes=1, out_channels=1), ('nucleus',), {'background', 'nucleus'}),
        (dict(num_classes=1, out_channels=1), 'nucleus', {'background', 'nucleus'}),
        # The checkpoint names fewer classes than the model has.
        (dict(num_classes=4), ('cat',), {'cat', 'class 1', 'class 2', 'class 3'}),
        (dict(num_classes=2), None, {'class 0', 'class 1'}),
    ],
)
def test_classes_of_all_kinds_of_heads(tmp_path, head, classes, names):
    path = tmp_path / 'image.png'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3)))
    cfg = segmentation(3, dict(type='LoadImageFromFile'), **head)
    model = build_model(cfg)
    model.cfg, model.dataset_meta = cfg, {} if classes is None else dict(classes=classes)
    predict = Predictor(model)
    labels = predict(path).sample.pred_sem_seg.data
    found = {text.rpartition(' ')[0].rpartition(' ')[0] for text in predict(path).text.split(', ')}
    assert len(found) == len(labels.unique())
    assert found <= names


def drawn(draw, **predictions):
    """The drawing of given predictions into a black image."""
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=(HEIGHT, WIDTH)))
    for name, value in predictions.items():
        setattr(sample, name, value)
    text, picture = draw(np.zeros((HEIGHT, WIDTH, 3), np.uint8), sample)
    assert picture.shape == (HEIGHT, WIDTH, 3)
    return text, picture


def test_one_class_is_drawn_in_its_colour():
    labels = torch.zeros(1, HEIGHT, WIDTH)
    labels[:, 20:] = 1
    draw = _segmentation_drawer(dict(classes=('nucleus',), palette=[(250, 0, 0)]))
    logits = PixelData(data=labels - 0.5)
    text, picture = drawn(draw, pred_sem_seg=PixelData(data=labels), seg_logits=logits)
    assert text == 'background 50.0 %, nucleus 50.0 %'
    assert (picture[30:] == (0, 0, 125)).all(axis=2).mean() > 0.5
    assert (picture[10:20] == 0).all(axis=2).mean() > 0.5


def test_an_image_of_one_pixel():
    labels = torch.full((1, 1, 1), 1)
    sample = SegDataSample(pred_sem_seg=PixelData(data=labels))
    draw = _segmentation_drawer(dict(classes=('a', 'b'), palette=[(9, 9, 9), (250, 0, 0)]))
    text, picture = draw(np.zeros((1, 1, 3), np.uint8), sample)
    assert text == 'b 100.0 %'
    assert picture.shape == (1, 1, 3)


def test_objects_of_classes_without_a_name():
    found = InstanceData(
        labels=torch.tensor([0, 2, 2]),
        scores=torch.tensor([0.9, 0.8, 0.1]),
        bboxes=torch.tensor([[5.0, 5, 30, 30]] * 3),
    )
    text, picture = drawn(_detection_drawer(dict(classes=('a',)), 0.5), pred_instances=found)
    assert text == '1 a (best 0.90), 1 class 2 (best 0.80)'
    assert picture.any()


def test_panoptic_maps():
    maps = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.long)
    # Two segments of class 1, and pixels without a class.
    maps[:, :10] = 1001
    maps[:, 10:20] = 2001
    maps[:, 20:30] = 2
    draw = _detection_drawer(dict(classes=('a', 'b'), palette=[(9, 9, 9)] * 2), 0.5)
    text, _ = drawn(draw, pred_panoptic_seg=PixelData(sem_seg=maps))
    assert text == 'b 50.0 %, a 25.0 %, no class 25.0 %'


def test_missing_names_and_colours_are_made_up():
    classes, palette = complete_classes(dict(classes=['a'], palette=[[1, 2, 3]]), torch.tensor([2]))
    assert classes == ['a', 'class 1', 'class 2']
    assert palette[0] == (1, 2, 3) and len(set(palette)) == 3
    assert complete_classes({}, torch.zeros(0)) == ([], [])


def test_models_that_are_neither_detectors_nor_segmentors():
    model = torch.nn.Linear(1, 1)
    model.cfg = Config(dict())
    with pytest.raises(ValueError, match='a classifier of mmpretrain, got Linear'):
        Predictor(model)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    'image',
    [RAMP, RAMP[..., None], np.stack([RAMP] * 3, -1), RAMP.astype(np.float32), RAMP.astype(int)],
    ids=['grey', 'one band', 'colour', 'floats', 'integers'],
)
def test_bytes_are_shown_as_they_are(image):
    assert np.array_equal(to_8_bit(image), np.stack([RAMP] * 3, -1))


@pytest.mark.parametrize('scale', [np.uint16(16), np.float32(1 / 255), np.float64(1e6)])
def test_other_ranges_are_stretched(scale):
    picture = to_8_bit(RAMP * scale)
    assert picture.dtype == np.uint8
    assert picture.min() == 0 and picture.max() == 255
    # The darkest and the brightest percent are clipped.
    assert np.abs(picture[..., 0].astype(int) - RAMP).max() <= 3


def test_odd_images_have_a_picture():
    assert to_8_bit(np.stack([RAMP] * 7, -1)).shape == (16, 16, 3)
    assert to_8_bit(np.stack([RAMP] * 2, -1)).shape == (16, 16, 3)
    assert not to_8_bit(np.full((4, 4, 3), 300, np.uint16)).any()
    missing = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    missing[0, 0] = np.nan
    assert to_8_bit(missing).max() == 255
