"""tools/infer.py on small models with known predictions: their last layer selects one class."""

from __future__ import annotations

import os
import re
import resource
import struct
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from pycocotools.coco import COCO

from saga_mm.apis import build_model

ROOT = Path(__file__).parents[2]
CLASSES = ('cat', 'dog', 'bird')
PALETTE = ((250, 0, 0), (0, 200, 0), (0, 0, 150))
DIMS = [8, 16, 24, 32]


def shrink(cfg):
    """The model of a demo config with a small backbone and three classes."""
    model = cfg.model
    model.backbone.arch = dict(embed_dims=DIMS, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    if cfg.default_scope == 'mmseg':
        model.decode_head.update(in_channels=DIMS, num_classes=len(CLASSES))
        model.auxiliary_head.update(in_channels=DIMS[2], num_classes=len(CLASSES))
    else:
        model.neck.in_channels = DIMS
        model.roi_head.bbox_head.num_classes = model.roi_head.mask_head.num_classes = len(CLASSES)
        model.test_cfg.rcnn.max_per_img = 4
    cfg.test_dataloader.dataset.update(
        type='CocoDataset' if cfg.default_scope == 'mmdet' else 'BaseSegDataset',
        metainfo=dict(classes=CLASSES, palette=PALETTE),
    )
    del cfg.test_dataloader.dataset['split']
    return cfg


def prefer(layer, label):
    """Make a classifier predict `label` for any input."""
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    layer.bias.data[label] = 5


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Arguments for a detector that only sees dogs, and a segmentor that only sees birds."""
    folder = tmp_path_factory.mktemp('models')
    arguments = {}
    for kind, name in (
        ('det', 'detection/mask_rcnn_saga_t_demo.py'),
        ('seg', 'segmentation/upernet_saga_t_demo.py'),
    ):
        cfg = shrink(Config.fromfile(ROOT / 'configs' / name))
        cfg.dump(folder / f'{kind}.py')
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        if kind == 'det':
            prefer(model.roi_head.bbox_head.fc_cls, CLASSES.index('dog'))
        else:
            prefer(model.decode_head.conv_seg, CLASSES.index('bird'))
        checkpoint = dict(state_dict=model.state_dict(), meta={})
        torch.save(checkpoint, folder / f'{kind}.pth')
        arguments[kind] = [
            f'--config={folder / kind}.py', f'--checkpoint={folder / kind}.pth', '--device=cpu'
        ]  # fmt: skip
    return arguments


@pytest.fixture
def infer(tool):
    return tool('infer')


@pytest.fixture
def image(tmp_path):
    """A photo of 70x90 that is all of one colour: red 200, green 100, blue 50."""
    path = tmp_path / 'in' / 'photo.png'
    path.parent.mkdir()
    cv2.imwrite(str(path), np.full((70, 90, 3), (50, 100, 200), np.uint8))
    return path


def copy(image, name):
    path = image.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(image.read_bytes())
    return path


@pytest.fixture
def fails(infer):
    """Calls the tool with arguments that must end it with status 1; returns the error line."""

    def call(argv):
        with pytest.raises(SystemExit) as stop:
            infer.main([str(arg) for arg in argv])
        # `sys.exit(message)` prints the message, and the status is 1
        message = stop.value.code
        assert isinstance(message, str)
        assert message.startswith('error: ')
        assert '\n' not in message
        return message

    return call


def test_segmentor_names_the_classes_and_draws_them(infer, models, image, tmp_path, capsys):
    out = tmp_path / 'out'
    infer.main([str(image), f'--out-dir={out}', *models['seg']])
    assert f'{image} -> {out / "photo.png"}: bird 100.0 %\n' in capsys.readouterr().out
    drawn = cv2.imread(str(out / 'photo.png'))
    # Half image and half colour of a bird, in OpenCV's order; the label covers a part.
    assert drawn.shape == (70, 90, 3)
    assert (drawn == (100, 50, 100)).all(axis=2).mean() > 0.7


def test_detector_counts_objects_and_draws_them(infer, models, image, tmp_path, capsys):
    out = tmp_path / 'out'
    infer.main([str(image), f'--out-dir={out}', *models['det']])
    # softmax of 5 against zeros for three classes and the background
    score = np.exp(5) / (np.exp(5) + 3)
    assert f': 4 dog (best {score:.2f})\n' in capsys.readouterr().out
    drawn = cv2.imread(str(out / 'photo.png'))
    assert drawn.shape == (70, 90, 3)
    assert (drawn != (50, 100, 200)).any(axis=2).mean() > 0.05


def test_label_maps_are_written_beside_drawings(infer, models, image, tmp_path, capsys):
    out, data = tmp_path / 'out', tmp_path / 'data'
    infer.main([str(image), f'--out-dir={out}', f'--predictions-dir={data}', *models['seg']])
    assert f': bird 100.0 %; label map: {data / "photo.png"}\n' in capsys.readouterr().out
    written = Image.open(data / 'photo.png')
    assert (np.asarray(written) == CLASSES.index('bird')).all()
    assert written.size == (90, 70)
    assert tuple(written.getpalette()[6:9]) == PALETTE[2]


def test_objects_are_written_as_a_coco_file(infer, models, image, tmp_path, capsys):
    out, data = tmp_path / 'out', tmp_path / 'data'
    (image.parent / 'broken.jpg').write_bytes(b'')
    with pytest.raises(SystemExit, match='1 of 2 images failed'):
        infer.main(
            [str(image.parent), f'--out-dir={out}', f'--predictions-dir={data}', *models['det']]
        )
    assert f'\nobjects: {data / "predictions.json"}\n' in capsys.readouterr().out
    coco = COCO(data / 'predictions.json')
    assert [item['name'] for item in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    (photo,) = coco.loadImgs(coco.getImgIds())
    assert (photo['file_name'], photo['width'], photo['height']) == (str(image), 90, 70)
    objects = coco.loadAnns(coco.getAnnIds(photo['id']))
    assert [item['category_id'] for item in objects] == [2] * 4
    for item in objects:
        x, y, width, height = item['bbox']
        assert 0 <= x < x + width <= 90.01 and 0 <= y < y + height <= 70.01
        assert item['score'] > 0.9
        mask = coco.annToMask(item)
        assert mask.shape == (70, 90) and mask.sum() == item['area']


def test_score_threshold_holds_for_text_and_drawing(infer, models, image, tmp_path, capsys):
    out = tmp_path / 'out'
    infer.main([str(image), f'--out-dir={out}', '--score-thr=0.99', *models['det']])
    assert ': nothing scores more than 0.99\n' in capsys.readouterr().out
    assert (cv2.imread(str(out / 'photo.png')) == (50, 100, 200)).all()


def test_class_names_come_from_the_checkpoint_first(infer, models, image, tmp_path, capsys):
    config, checkpoint, device = models['seg']
    content = torch.load(checkpoint.partition('=')[2])
    # Older releases saved keys in capitals.
    content['meta'] = {'dataset_meta': {'CLASSES': ('x', 'y', 'owl '), 'PALETTE': [[0, 0, 0]] * 3}}
    torch.save(content, tmp_path / 'owl.pth')
    arguments = [
        config,
        device,
        f'--checkpoint={tmp_path / "owl.pth"}',
        f'--out-dir={tmp_path / "o"}',
    ]
    infer.main([str(image), *arguments])
    assert ': owl 100.0 %\n' in capsys.readouterr().out


def test_plain_weights_of_a_wrapped_model_load(infer, models, image, tmp_path, capsys):
    config, checkpoint, device = models['seg']
    weights = torch.load(checkpoint.partition('=')[2])['state_dict']
    torch.save({f'module.{k}': v for k, v in weights.items()}, tmp_path / 'plain.pth')
    arguments = [config, device, f'--checkpoint={tmp_path / "plain.pth"}']
    infer.main([str(image), *arguments, f'--out-dir={tmp_path / "o"}'])
    assert ': bird 100.0 %\n' in capsys.readouterr().out


def test_config_options_apply(infer, models, image, tmp_path, capsys):
    options = ['--cfg-options', 'model.test_cfg.rcnn.max_per_img=2']
    infer.main([str(image), f'--out-dir={tmp_path / "o"}', *models['det'], *options])
    assert ': 2 dog (' in capsys.readouterr().out


def test_files_folders_and_globs_give_one_png_each(infer, models, image, tmp_path, capsys):
    copy(image, 'photo.jpg'), copy(image, 'photo_2.png'), copy(image, 'more/Photo.png')
    (image.parent / 'notes.txt').touch()
    out = tmp_path / 'out'
    inputs = [image.parent, image, f'{image.parent}/**/P*.png']
    infer.main([*map(str, inputs), f'--out-dir={out}', *models['seg']])
    lines = [line for line in capsys.readouterr().out.splitlines() if ' -> ' in line]
    pairs = dict(line.split(': ')[0].split(' -> ') for line in lines)
    names = {Path(path).relative_to(image.parent).as_posix(): Path(png).name
             for path, png in pairs.items()}  # fmt: skip
    assert names == {
        'photo.jpg': 'photo.png',
        'photo.png': 'photo_3.png',
        'photo_2.png': 'photo_2.png',
        'more/Photo.png': 'Photo_4.png',
    }
    assert {path.name for path in out.iterdir()} == set(names.values())


def png_header(width, height):
    """A PNG file that declares a size, and has no pixels."""
    chunk = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + struct.pack('>I', 13) + chunk + struct.pack('>I', crc32(chunk))


def test_odd_files_are_named_and_the_others_drawn(fails, models, image, tmp_path, capsys):
    folder = image.parent
    (folder / 'huge.png').write_bytes(png_header(100000, 100000))
    os.mkfifo(folder / 'pipe.png')
    (folder / 'folder.png').mkdir()
    (folder / 'link.png').symlink_to('nowhere.png')
    for name, shape in (('dot', (1, 1, 3)), ('line', (1, 3000, 3)), ('column', (3000, 1, 3))):
        cv2.imwrite(str(folder / f'{name}.png'), np.zeros(shape, np.uint8))
    named = folder / os.fsdecode(b'\xff\x1b[31m.png')
    named.write_bytes(image.read_bytes())
    out = tmp_path / 'out'
    # Less than half a pixel is left of a line that is resized like this.
    step = 'test_dataloader.dataset.pipeline.1'
    resize = [f'{step}.type=Resize', f'{step}.scale=(171,128)', f'{step}.keep_ratio=True']
    message = fails([folder, f'--out-dir={out}', *models['seg'], '--cfg-options', *resize])
    printed = capsys.readouterr().out
    assert '\x1b' not in printed and r'\udcff\x1b[31m.png: bird 100.0 %' in printed
    assert message.startswith('error: 6 of 9 images failed: ')
    drawn = ('dot.png', named.name, 'photo.png')
    for name in ('column.png', 'line.png', 'huge.png', 'pipe.png', 'folder.png', 'link.png'):
        assert name in message
        assert f'/{name}: failed: ' in printed
    assert '/pipe.png: failed: not a regular file' in printed
    assert '/huge.png: failed: not readable as an image: ' in printed
    assert sorted(out.iterdir()) == sorted(out / name for name in drawn)


@pytest.mark.parametrize('error', [MemoryError(), RuntimeError('out of memory'), KeyError('masks')])
def test_an_error_of_one_image_leaves_the_others(
    infer, fails, models, image, tmp_path, monkeypatch, error
):
    first = copy(image, 'a.png')
    load_model = infer.load_model

    def load(*args):
        model = load_model(*args)
        step = model.test_step

        def test_step(data):
            if data['data_samples'][0].img_path == str(first):
                raise error
            return step(data)

        model.test_step = test_step
        return model

    monkeypatch.setattr(infer, 'load_model', load)
    message = fails([image.parent, f'--out-dir={tmp_path / "o"}', *models['seg']])
    assert message.startswith(f'error: 1 of 2 images failed: {first}: ')
    assert (tmp_path / 'o/photo.png').is_file()


def test_a_full_disk_leaves_the_drawing_of_before(fails, models, image, tmp_path):
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (300, 300, 3)))
    out = tmp_path / 'out/photo.png'
    out.parent.mkdir()
    out.write_bytes(b'before')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, limits[1]))
    try:
        message = fails([image, f'--out-dir={out.parent}', *models['seg']])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f'File too large: {out}' in message
    assert [(path, path.read_bytes()) for path in out.parent.iterdir()] == [(out, b'before')]


def test_a_config_of_classes_in_place_of_names(infer, pure_python, image, tmp_path, capsys):
    checkpoint = tmp_path / 'pure.pth'
    torch.save(build_model(Config.fromfile(pure_python)).state_dict(), checkpoint)
    arguments = [f'--config={pure_python}', f'--checkpoint={checkpoint}', '--device=cpu']
    infer.main([str(image), *arguments, f'--out-dir={tmp_path / "o"}'])
    assert re.search(r'photo\.png: [ab] \d+\.\d %', capsys.readouterr().out)


def test_a_file_with_glob_characters_is_a_file(infer, image):
    odd = copy(image, 'a[1].png')
    assert infer.find_images([str(odd)]) == [odd]


def test_an_image_is_never_overwritten(fails, models, image):
    before = image.read_bytes()
    message = fails([image, f'--out-dir={image.parent}', *models['seg']])
    assert 'out-dir' in message
    assert image.read_bytes() == before


def test_broken_images_are_named_and_the_others_drawn(fails, models, image, tmp_path, capsys):
    copy(image, 'bad.jpg').write_bytes(b'no image')
    copy(image, 'empty.jpg').write_bytes(b'')
    out = tmp_path / 'out'
    message = fails([image.parent, f'--out-dir={out}', *models['seg']])
    assert 'bad.jpg' in message and 'empty.jpg' in message and 'photo' not in message
    printed = capsys.readouterr().out
    assert '/empty.png: failed: not readable as an image: the file is empty' in printed
    assert [path.name for path in out.iterdir()] == ['photo.png']


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (['--device=cuda:99'], "'cuda:99'"),
        (['--device=abacus'], "'abacus'"),
        (['--score-thr=1.5'], 'score-thr'),
        (['--config=missing.py'], 'missing.py'),
        (['--checkpoint=missing.pth'], 'missing.pth'),
        (['--predictions-dir=out'], 'predictions-dir must be neither out-dir nor'),
        (['--predictions-dir=in'], 'predictions-dir must be neither out-dir nor'),
        (['--predictions-dir=p', '--max-memory=1GB'], 'without --predictions-dir'),
        (['--maps-dir=m'], '--maps-dir needs --max-memory'),
        (['--maps-dtype=float16'], '--maps-dtype needs --max-memory'),
        (['--cfg-options', 'default_scope=mmpose'], "'EncoderDecoder', default_scope 'mmpose'"),
        (['--cfg-options', 'optim_wraper.lr=1'], "has no entry 'optim_wraper'"),
    ],
)
def test_wrong_arguments_are_one_line(fails, models, image, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    message = fails([image, '--out-dir=out', *models['seg'], *change])
    assert words in message
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('pattern', ['missing.jpg', 'nothing/*.jpg', 'empty'])
def test_inputs_without_an_image_are_one_line(fails, models, image, tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    assert pattern in fails([image, pattern, '--out-dir=out', *models['seg']])
    assert not (tmp_path / 'out').exists()


def test_out_dir_that_is_a_file(fails, models, image, tmp_path):
    (tmp_path / 'file').touch()
    message = fails([image, f'--out-dir={tmp_path / "file" / "out"}', *models['seg']])
    assert 'file' in message


def test_checkpoint_of_another_model_is_refused(fails, models, image, tmp_path):
    other = models['det'][1]
    message = fails([image, f'--out-dir={tmp_path / "o"}', *models['seg'], other])
    # The backbones fit, but the heads do not.
    assert 'det.pth does not fit' in message
    assert 'missing' in message and 'unexpected' in message
    assert not (tmp_path / 'o').exists()


def test_weights_of_another_shape_are_refused(fails, models, image, tmp_path):
    argv = [image, f'--out-dir={tmp_path / "o"}', *models['seg']]
    argv += ['--cfg-options', 'model.decode_head.num_classes=7']
    message = fails(argv)
    assert '2 mismatched (decode_head.conv_seg' in message


def test_training_parts_may_be_missing(infer, models, image, tmp_path, capsys):
    config, checkpoint, device = models['seg']
    content = torch.load(checkpoint.partition('=')[2])
    for key in [key for key in content['state_dict'] if key.startswith('auxiliary_head')]:
        del content['state_dict'][key]
    torch.save(content, tmp_path / 'lean.pth')
    arguments = [config, device, f'--checkpoint={tmp_path / "lean.pth"}']
    infer.main([str(image), *arguments, f'--out-dir={tmp_path / "o"}'])
    output = capsys.readouterr().out
    assert 'missing (auxiliary_head' in output
    assert ': bird 100.0 %' in output


def test_debug_shows_the_traceback(infer, image, tmp_path):
    with pytest.raises(ValueError, match='no such image'):
        infer.main(['gone.jpg', '--config=c', '--checkpoint=k', f'--out-dir={tmp_path}', '--debug'])


def test_bounded_memory_writes_the_class_of_each_pixel(infer, models, image, tmp_path, capsys):
    out = tmp_path / 'out'
    infer.main([
        str(image), f'--out-dir={out}', '--max-memory=100MB', f'--maps-dir={tmp_path / "maps"}',
        '--maps-dtype=float16',
        *models['seg'],
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert f'{image} -> {out / "photo.png"}: \n' in printed
    assert re.search(r'\n +2  bird  #000096 +6,300 pixels +100\.0 %\n', printed)
    written = Image.open(out / 'photo.png')
    assert written.mode == 'P'
    assert np.array_equal(np.asarray(written), np.full((70, 90), 2, np.uint8))
    assert written.convert('RGB').getpixel((0, 0)) == PALETTE[2]


def test_cascades_run_in_bounded_memory(infer, tiny_seg, image, tmp_path):
    config = tiny_seg.with_name('cascade.py')
    head = dict(
        in_channels=[8, 16], in_index=[0, 1], input_transform='resize_concat', channels=8,
        num_classes=2, norm_cfg=dict(type='BN'),
    )  # fmt: skip
    heads = [dict(head, type='FCNHead', num_convs=1), dict(head, type='OCRHead', ocr_channels=8)]
    config.write_text(
        f"_base_ = './{tiny_seg.name}'\n"
        f"model = dict(type='CascadeEncoderDecoder', num_stages=2, decode_head={heads})\n"
    )
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'weights.pth')
    model = [f'--config={config}', f'--checkpoint={tmp_path / "weights.pth"}', '--device=cpu']
    out, maps = tmp_path / 'out', tmp_path / 'maps'
    infer.main([str(image), f'--out-dir={out}', f'--predictions-dir={maps}', *model])
    infer.main([str(image), f'--out-dir={out}', '--max-memory=1GiB', *model])
    whole, bounded = (np.asarray(Image.open(folder / 'photo.png')) for folder in (maps, out))
    assert np.array_equal(whole, bounded)


def test_georeferencing_is_kept(infer, models, image, tmp_path, capsys):
    tifffile = pytest.importorskip('tifffile')
    tags = {
        33550: (12, (0.5, 0.5, 0.0)),
        33922: (12, (0.0, 0.0, 0.0, 450000.0, 5200000.0, 0.0)),
        34735: (3, (1, 1, 0, 1, 3072, 0, 1, 32633)),
        34737: (2, 'WGS 84|'),
    }
    path = image.with_suffix('.tif')
    extra = [(code, kind, len(value), value, True) for code, (kind, value) in tags.items()]
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)
    tifffile.imwrite(path, pixels, extratags=extra, photometric='rgb')
    infer.main([str(path), f'--out-dir={tmp_path / "out"}', '--max-memory=1GiB', *models['seg']])
    with tifffile.TiffFile(tmp_path / 'out' / 'photo.tif') as written:
        page = written.pages[0]
        assert {code: page.tags[code].value for code in tags} == {
            code: value for code, (_, value) in tags.items()
        }
        assert np.array_equal(page.asarray(), np.full((70, 90), 2, np.uint8))
        assert page.tags['ColorMap'].value[2][2] == PALETTE[2][2] * 257
    # pixels of half a metre
    assert '6,300 pixels  100.0 %  1,575.0 m2' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('kind', 'option', 'words'),
    [
        ('seg', '100kB', 'photo.png: max_memory must be at least .* for an image of 90x70 pixels'),
        ('det', '1GB', 'bounded memory needs a segmentor of mmseg, got MaskRCNN'),
    ],
)
def test_bounded_memory_that_can_not_be(fails, models, image, tmp_path, kind, option, words):
    argv = [image, f'--out-dir={tmp_path / "out"}', f'--max-memory={option}', *models[kind]]
    assert re.search(words, fails(argv))
    assert not list(tmp_path.glob('out/*'))
