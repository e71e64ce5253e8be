"""Images that are segmented in one piece and bounded memory get the classes of a plain pass."""

import copy
import errno

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from saga_mm.apis import ImagePipeline, WholePredictor, build_model, segment_whole
from saga_mm.apis import whole as whole_module
from saga_mm.apis.preprocessed import preprocess
from saga_mm.apis.tiff_rows import TiffRows
from saga_mm.inference import ImageRows, LiveBytes, chunked, run_embed, storage, store_maps

DIMS = [8, 16, 24, 32]
CLASSES = 7
PYRAMID = dict(embed_dims=DIMS, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
BACKBONES = {
    'saga': dict(type='saga_mm.SAGA', arch=PYRAMID),
    'ravlt': dict(
        type='saga_mm.RAVLT', arch=dict(PYRAMID, num_heads=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
    ),
    'sola_vision': dict(type='saga_mm.SoLAVision', arch=PYRAMID),
    'mit': dict(
        type='MixVisionTransformer',
        embed_dims=8,
        num_heads=[1, 2, 3, 4],
        num_layers=[1, 1, 1, 1],
    ),
    'resnet': dict(type='ResNet', depth=18, base_channels=8, norm_cfg=dict(type='BN')),
}
WIDTHS = {'mit': [8, 16, 24, 32], 'resnet': [8, 16, 32, 64]}
NORM = dict(type='SyncBN', requires_grad=True)
FINEST_FIRST = dict(in_index=[0, 1, 2, 3], channels=12, norm_cfg=NORM)
# By name: a neck or None, and a head.
HEADS = {
    'upernet': (None, dict(type='UPerHead', pool_scales=(1, 2, 3, 6), **FINEST_FIRST)),
    'semantic fpn': (
        dict(type='FPN', out_channels=16, num_outs=4),
        dict(type='FPNHead', feature_strides=[4, 8, 16, 32], **FINEST_FIRST),
    ),
    'semantic fpn, neck of mmdet': (
        dict(type='mmdet.FPN', out_channels=16, num_outs=5, add_extra_convs='on_output'),
        dict(type='FPNHead', feature_strides=[4, 8, 16, 32], **FINEST_FIRST),
    ),
    'segformer': (None, dict(type='SegformerHead', **FINEST_FIRST)),
    'segformer on levels': (
        dict(type='MultiLevelNeck', out_channels=16, scales=[2, 1, 1, 0.5]),
        dict(type='SegformerHead', **FINEST_FIRST),
    ),
    'fcn': (None, dict(type='FCNHead', in_index=1, channels=12, dilation=2, norm_cfg=NORM)),
    'fcn on all scales': (
        None,
        dict(FINEST_FIRST, type='FCNHead', input_transform='resize_concat'),
    ),
    'psp': (None, dict(type='PSPHead', in_index=3, channels=12, norm_cfg=NORM)),
}


def make_model(backbone='saga', head='upernet', changes=(), **options):
    """A segmentor with random weights and random statistics of its norms.

    `options` are those of the head, and `changes` are entries of the model's config.
    """
    neck, head = copy.deepcopy(HEADS[head])
    widths = WIDTHS.get(backbone, DIMS)
    if neck is not None:
        neck['in_channels'], widths = widths, [16] * 4
    index = head['in_index']
    head['in_channels'] = widths if isinstance(index, list) else widths[index]
    head |= dict(num_classes=CLASSES, dropout_ratio=0.1) | options
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor', mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True
        ),
        backbone=BACKBONES[backbone],
        decode_head=head,
        neck=neck,
        test_cfg=dict(mode='whole'),
    )
    torch.manual_seed(0)
    cfg = Config(dict(default_scope='mmseg', model=model))
    cfg.merge_from_dict({f'model.{key}': value for key, value in dict(changes).items()})
    model = build_model(cfg)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, std=0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return model


def make_data(height=70, width=90, **meta):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    shapes = dict(img_shape=(height, width), ori_shape=(height, width))
    return dict(inputs=image, data_samples=SegDataSample(metainfo=shapes | meta))


def check(model, data, logits=1e-4, classes=1e-3, **options):
    """Compare with the plain pass; return the labels. Classes of nearly equal logits may swap.

    `logits` bounds the loss of logit in standard deviations, and `classes` the share that swaps.
    """
    with torch.no_grad():
        (plain,) = model.test_step(pseudo_collate([copy.deepcopy(data)]))
    done = []
    found = segment_whole(model, data, 2**30, lambda *counts: done.append(counts), **options)
    labels = found.pred_sem_seg.data
    scores = plain.seg_logits.data
    assert labels.shape == plain.pred_sem_seg.data.shape
    if len(scores) > 1:
        chosen = scores.gather(0, labels.long())
        assert (scores.amax(0, keepdim=True) - chosen).max() < logits * scores.std()
    different = (labels != plain.pred_sem_seg.data).float().mean()
    assert different < classes
    return labels, done


class OwnDecoder(EncoderDecoder):
    def encode_decode(self, inputs, metas):
        return super().encode_decode(inputs, metas)


@pytest.fixture
def log(monkeypatch):
    """The lines that are logged."""
    lines = []
    monkeypatch.setattr(whole_module, 'print_log', lambda line, logger: lines.append(line))
    return lines


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(whole_module, 'CHUNK', 2**16)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('head', HEADS)
def test_all_heads(head, align_corners, log):
    model = make_model(head=head, align_corners=align_corners)
    labels, done = check(model, make_data())
    assert len(labels.unique()) > 2
    assert labels.dtype == torch.uint8
    assert len(done) > 3
    assert done[-1] == (70 * 90, 70 * 90)
    assert sorted(done) == done
    assert not log


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('size', [(33, 47), (1, 40), (64, 1), (130, 66)])
def test_all_backbones_and_odd_sizes(backbone, size):
    # the pooling layers of MiT need more than one row
    if backbone == 'mit' and 1 in size:
        size = (40, 36)
    check(make_model(backbone, 'segformer'), make_data(*size))


@pytest.mark.parametrize(
    'meta',
    [
        dict(ori_shape=(35, 45), scale_factor=(2.0, 2.0)),
        dict(ori_shape=(141, 173)),
        dict(flip=True, flip_direction='horizontal'),
        dict(flip=True, flip_direction='vertical', ori_shape=(100, 90)),
        dict(padding_size=[3, 4, 5, 6], flip=True, flip_direction='vertical'),
    ],
)
def test_resizing_flips_and_padding_of_the_pipeline(meta):
    labels, _ = check(make_model(), make_data(**meta))
    assert labels.shape == (1, *meta.get('ori_shape', (70, 90)))


@pytest.mark.parametrize('pad_mask', [False, True])
def test_padding_of_the_preprocessor(pad_mask):
    changes = {'data_preprocessor.test_cfg': dict(size_divisor=64)}
    if pad_mask:
        changes |= {
            'data_preprocessor.type': 'saga_mm.MaskedSegDataPreprocessor',
            'backbone.pad_mask': True,
        }
    check(make_model(changes=changes), make_data())


def test_a_head_with_one_channel():
    model, data = make_model(num_classes=2, out_channels=1), make_data()
    with torch.no_grad():
        (plain,) = model.test_step(pseudo_collate([copy.deepcopy(data)]))
    model.decode_head.threshold = plain.seg_logits.data.median().item()
    labels, _ = check(model, data)
    assert labels.unique().tolist() == [0, 1]


def test_many_classes():
    labels, _ = check(make_model(head='fcn', num_classes=300), make_data())
    assert labels.dtype == torch.int16
    assert labels.max() > 255


def test_the_data_is_left_as_it_was():
    data = make_data(flip=True, flip_direction='horizontal')
    before = copy.deepcopy(data)
    segment_whole(make_model(), data, 2**30)
    assert torch.equal(data['inputs'], before['inputs'])
    assert data['data_samples'].metainfo == before['data_samples'].metainfo


@pytest.mark.parametrize(
    ('options', 'reason'),
    [
        (dict(head='upernet', norm_cfg=dict(type='GN', num_groups=2)), 'group_norm'),
        (dict(head='fcn', changes={'type': 'OwnDecoder'}), 'encode_decode'),
    ],
)
def test_others_run_in_one_piece_and_say_so(options, reason, log):
    MODELS.register_module(module=OwnDecoder, force=True)
    check(make_model(**options), make_data())
    (line,) = log
    assert 'in one piece' in line
    assert reason in line


def test_windows_of_the_config_are_not_used_and_the_log_says_so(log):
    model, data = make_model(), make_data()
    expected = segment_whole(model, data, 2**30).pred_sem_seg.data
    assert not log
    model.test_cfg.update(mode='slide', crop_size=(32, 32), stride=(16, 16))
    assert torch.equal(segment_whole(model, data, 2**30).pred_sem_seg.data, expected)
    assert log == ["the image is segmented in one piece, not by test_cfg.mode='slide'"]


def test_hooks_of_a_head_are_called():
    model = make_model()
    seen = []
    model.decode_head.conv_seg.register_forward_hook(lambda *args: seen.append(args[-1].shape))
    check(model, make_data())
    assert len(seen) == 2


def test_an_image_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r'max_memory must be at least .* MiB for .* 90x70 pixels'):
        segment_whole(make_model(), make_data(), 2**16)


def test_memory_is_bounded():
    """The logits of a plain pass alone take more than everything here."""
    model, data = make_model(num_classes=150), make_data(512, 512)
    with LiveBytes() as plain, torch.no_grad():
        model.test_step(pseudo_collate([copy.deepcopy(data)]))
    limit = 2**24
    with LiveBytes() as live:
        segment_whole(model, data, limit)
    assert live.peak <= 1.1 * limit
    assert plain.peak > 10 * limit


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(test_cfg=dict(size_divisor=32), pad_val=7),
        dict(test_cfg=dict(size=(80, 96))),
        dict(test_cfg=dict(size=(80, 96)), pad_val=3, type='saga_mm.MaskedSegDataPreprocessor'),
        dict(type='saga_mm.MaskedSegDataPreprocessor', bgr_to_rgb=False, mean=None, std=None),
    ],
)
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int16, torch.float32])
def test_rows_are_preprocessed_as_the_whole_image_is(options, dtype):
    changes = {f'data_preprocessor.{key}': value for key, value in options.items()}
    model, data = make_model(changes=changes), make_data()
    data['inputs'] = data['inputs'].to(dtype)
    batch = model.data_preprocessor(pseudo_collate([copy.deepcopy(data)]), False)
    rows, sample = preprocess(model, data)
    assert sample.metainfo == batch['data_samples'][0].metainfo
    assert torch.equal(rows.whole(), batch['inputs'])
    assert torch.equal(rows[:, 60:75].permute(0, 3, 1, 2), batch['inputs'][:, :, 60:75])
    assert rows.shape == batch['inputs'].permute(0, 2, 3, 1).shape


@pytest.mark.parametrize('name', ['saga', 'ravlt', 'sola_vision'])
def test_the_image_does_not_exist_as_floating_point_numbers(name, monkeypatch):
    """The map of the first stage has 8 channels at a stride of 4: a sixth of the image."""
    model, data = make_model(name, 'segformer'), make_data(2048, 512)
    image, _ = preprocess(model, data)
    monkeypatch.setattr(chunked, 'BUDGET', 2**17)
    with LiveBytes() as live, torch.no_grad():
        run_embed(model.backbone.stages[0].embed, image)
    assert live.peak < 4 * data['inputs'].numel() / 2
    with LiveBytes() as live, torch.no_grad():
        image.whole()
    assert live.peak >= 4 * data['inputs'].numel()


@pytest.fixture
def write_tiff(tmp_path):
    """Writes an image (3, H, W), BGR, as a TIFF file of tiles."""
    tifffile = pytest.importorskip('tifffile')

    def write(image, **options):
        pixels = image.flip(0).permute(1, 2, 0).numpy()
        options = dict(tile=(16, 32), compression='zlib') | options
        tifffile.imwrite(tmp_path / 'image.tif', pixels, photometric='rgb', **options)
        return tmp_path / 'image.tif'

    return write


@pytest.mark.parametrize(
    'options', [{}, dict(backbone='mit'), dict(changes={'type': 'OwnDecoder'})]
)
def test_an_image_that_is_read_by_rows(options, write_tiff):
    MODELS.register_module(module=OwnDecoder, force=True)
    model, data = make_model(head='segformer', **options), make_data(70, 90)
    expected = segment_whole(model, data, 2**30).pred_sem_seg.data
    rows = dict(data, inputs=TiffRows(write_tiff(data['inputs'])))
    assert torch.equal(segment_whole(model, rows, 2**30).pred_sem_seg.data, expected)


def make_predictor(steps=()):
    steps = [dict(type='LoadImageFromFile'), *steps, dict(type='PackSegInputs')]
    model = make_model(head='segformer')
    model.cfg, model.dataset_meta = Config(dict(test_pipeline=steps)), {}
    return WholePredictor(model, 2**30)


def test_tiff_images_are_read_by_rows(write_tiff, tmp_path, monkeypatch, log):
    tifffile = pytest.importorskip('tifffile')
    data = make_data()
    path, predictor = write_tiff(data['inputs']), make_predictor()
    expected = segment_whole(predictor.model, data, 2**30).pred_sem_seg.data[0]
    monkeypatch.setattr(ImagePipeline, '__call__', None)
    predictor(path, tmp_path / 'classes.tif')
    assert (tifffile.imread(tmp_path / 'classes.tif') == expected.numpy()).all()
    assert not log


def test_others_are_read_as_a_whole_and_the_log_says_so(write_tiff, tmp_path, log):
    path = write_tiff(make_data()['inputs'], tile=None, compression=None)
    resize = dict(type='Resize', scale=(96, 96))
    make_predictor([resize])(path, tmp_path / 'classes.tif')
    (line,) = log
    assert line.startswith('image.tif is loaded as a whole: the test pipeline has Resize')


@pytest.mark.parametrize('backbone', ['saga', 'ravlt', 'sola_vision', 'mit'])
def test_maps_in_files(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    check(make_model(backbone, 'segformer'), make_data(130, 66), maps_dir=tmp_path)
    assert not list(tmp_path.iterdir())


# bfloat16 has an eighth of the precision of float16
@pytest.mark.parametrize(('dtype', 'logits'), [(torch.float16, 0.02), (torch.bfloat16, 0.16)])
@pytest.mark.parametrize('backbone', ['saga', 'ravlt', 'sola_vision'])
def test_maps_in_half_precision(backbone, dtype, logits, monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    # several chunks even of the last maps
    monkeypatch.setattr(chunked, 'BUDGET', 2**10)
    model, data = make_model(backbone, 'segformer'), make_data(130, 66)
    check(model, data, logits, classes=0.5 * logits, maps_dtype=dtype)
    with torch.no_grad(), store_maps(dtype=dtype):
        maps = model.backbone(preprocess(model, data)[0])
    assert {map_.dtype for map_ in maps} == {dtype}


@pytest.mark.parametrize(
    'options',
    [
        dict(head='upernet', norm_cfg=dict(type='GN', num_groups=2)),
        dict(
            changes={
                'data_preprocessor.type': 'saga_mm.MaskedSegDataPreprocessor',
                'data_preprocessor.test_cfg': dict(size_divisor=64),
                'backbone.pad_mask': True,
            }
        ),
    ],
    ids=['a head that runs in one piece', 'padding'],
)
def test_half_precision_with(options, monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    monkeypatch.setattr(chunked, 'BUDGET', 2**10)
    check(make_model(**options), make_data(), 0.02, classes=0.01, maps_dtype=torch.float16)


def test_maps_in_half_precision_and_in_files(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    options = dict(maps_dir=tmp_path, maps_dtype=torch.float16)
    check(make_model(), make_data(), logits=0.02, classes=0.01, **options)
    assert not list(tmp_path.iterdir())


def test_hooks_see_full_precision(monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    model, seen = make_model(), set()
    for stage in model.backbone.stages:
        for part in (stage.embed, stage.blocks[0]):
            part.register_forward_hook(lambda module, args, out: seen.add(args[0].dtype))
    segment_whole(model, make_data(), 2**30, maps_dtype=torch.float16)
    assert seen == {torch.float32}


def test_maps_in_half_precision_take_half_the_memory(monkeypatch):
    model, image = make_model(), ImageRows.of(torch.zeros(1).expand(1, 3, 4096, 4096))
    monkeypatch.setattr(storage, 'SMALLEST', 2**10)
    monkeypatch.setattr(chunked, 'BUDGET', 2**10)
    monkeypatch.setattr(whole_module, 'SAMPLE', 128)
    with torch.no_grad():
        full = whole_module.backbone_bytes(model.backbone, image)
        with store_maps(dtype=torch.float16):
            half = whole_module.backbone_bytes(model.backbone, image)
    assert half < 0.6 * full


def test_the_memory_of_a_backbone_is_measured_once(monkeypatch):
    model, passes = make_model(), []
    backbone_forward = type(model.backbone).forward

    def image(side, dtype=torch.float32):
        return ImageRows.of(torch.zeros(1, dtype=dtype).expand(1, 3, side, side))

    def forward(backbone, x):
        passes.append(tuple(x.shape))
        return backbone_forward(backbone, x)

    monkeypatch.setattr(whole_module, 'SAMPLE', 64)
    monkeypatch.setattr(whole_module, 'run_backbone', forward)
    with torch.no_grad():
        first = whole_module.backbone_bytes(model.backbone, image(256))
        assert passes == [(1, 64, 64, 3), (1, 128, 64, 3)]
        assert whole_module.backbone_bytes(model.backbone, image(256)) == first
        whole_module.backbone_bytes(model.backbone, image(512))
        assert len(passes) == 2
        # what the number depends on
        with store_maps(dtype=torch.float16):
            whole_module.backbone_bytes(model.backbone, image(256))
        assert len(passes) == 4
        whole_module.backbone_bytes(model.backbone.double(), image(256, torch.float64))
        assert len(passes) == 6


def test_a_value_that_half_precision_does_not_hold_is_an_error(monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    model, data = make_model(), make_data()
    with torch.no_grad():
        model.backbone.stages[0].embed.embed2.norm.weight.fill_(1e6)
    with pytest.raises(
        ValueError, match=r'has the value .* holds up to 6\.55e\+04; torch.bfloat16'
    ):
        segment_whole(model, data, 2**30, maps_dtype=torch.float16)
    check(model, data, logits=0.16, classes=0.1, maps_dtype=torch.bfloat16)


def test_other_dtypes_of_maps_are_errors():
    with pytest.raises(ValueError, match=r'maps_dtype must be .*, got torch\.int8'):
        segment_whole(make_model(), make_data(), 2**30, maps_dtype=torch.int8)


def test_maps_in_files_take_less_memory(tmp_path, monkeypatch):
    model, image = make_model(), ImageRows.of(torch.zeros(1).expand(1, 3, 4096, 4096))
    monkeypatch.setattr(storage, 'SMALLEST', 2**16)
    with torch.no_grad():
        in_memory = whole_module.backbone_bytes(model.backbone, image)
        with store_maps(tmp_path):
            on_disk = whole_module.backbone_bytes(model.backbone, image)
    assert on_disk < 0.8 * in_memory


def test_maps_in_files_are_no_memory_of_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, 'SMALLEST', 1)
    # many rows, of which few are needed at a time
    model, data = make_model(head='fcn'), make_data(4096, 32)
    image, sample = preprocess(model, data)
    with torch.no_grad():
        with store_maps(tmp_path):
            maps = model.backbone(image)
        limit = sum(map_.nbytes for map_ in maps)
        parts = list(whole_module.decode(model, maps, sample, limit, keeps_result=False))
        assert parts[-1][0].stop == 4096
        in_memory = tuple(map(torch.clone, maps))
        with pytest.raises(ValueError, match='max_memory must be at least'):
            list(whole_module.decode(model, in_memory, sample, limit, keeps_result=False))


def test_a_disk_without_room_is_an_error(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(storage, 'SMALLEST', 1)
    monkeypatch.setattr(storage.os, 'posix_fallocate', full)
    with pytest.raises(OSError, match='No space left'):
        segment_whole(make_model(), make_data(), 2**30, maps_dir=tmp_path)
    assert not list(tmp_path.iterdir())
