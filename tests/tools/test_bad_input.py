"""A table of wrong inputs: each ends in one line that names the fault, and changes no file."""

import json
import os
import re
import resource
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from saga_kernels import gated_linear_attention
from saga_mm.backbones import SAGA
from saga_mm.checkpoint import load_weights
from saga_mm.engine import AtomicCheckpointHook, LayerDecayOptimWrapperConstructor

TINY = dict(arch=dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1))

# all images in the first batch
ALL = 'train_dataloader.batch_size=6'
FILTER = 'train_dataloader.dataset.filter_cfg.filter_empty_gt=True'


def attend(shape=(1, 4, 5, 1, 8), dtype=None, device=None, **options):
    return gated_linear_attention(torch.zeros(shape, dtype=dtype, device=device), **options)


def backbone(**options):
    return SAGA(**TINY | options)


def arch(**changes):
    return backbone(arch=TINY['arch'] | changes)


def optimize(**paramwise_cfg):
    optimizer = dict(type='AdamW', lr=1e-3)
    return LayerDecayOptimWrapperConstructor(dict(optimizer=optimizer), paramwise_cfg)


# The call, and the text of the error.
LIBRARY = {
    'op: no tensor': (
        lambda: gated_linear_attention([1.0]),
        'must be 5 tensors .* got float',
    ),
    'op: integers': (lambda: attend(dtype=torch.int64), 'must be float16, .* got torch.int64'),
    'op: rank': (lambda: attend((1, 4, 8)), r'must have shape \(B, N, 5, H, D\), got \(1, 4, 8\)'),
    'op: parts': (lambda: attend((1, 4, 3, 1, 8)), r'\(B, N, 5, H, D\), got \(1, 4, 3, 1, 8\)'),
    'op: no head': (lambda: attend((1, 4, 5, 0, 8)), 'at least one head and channel'),
    'op: eps': (lambda: attend(eps=0), 'eps must be a positive number, got 0'),
    'op: eps as text': (
        lambda: attend(eps='1e-6'),
        "eps must be a positive number, got '1e-6'",
    ),
    'op: feature map': (
        lambda: attend(feature_map='exp'),
        "feature_map must be one of .*, got 'exp'",
    ),
    'op: impl': (lambda: attend(impl='cuda'), "impl must be one of .*, got 'cuda'"),
    'op: mask dtype': (
        lambda: attend(mask=torch.ones(1, 4)),
        'mask must be a bool tensor, got torch.float32',
    ),
    'op: mask shape': (
        lambda: attend(mask=torch.ones(1, 5, dtype=torch.bool)),
        r'mask must have shape \(B, N\) = \(1, 4\), got \(1, 5\)',
    ),
    'op: mask device': (
        lambda: attend(mask=torch.ones(1, 4, dtype=torch.bool, device='meta')),
        'mask must be on cpu, got meta',
    ),
    'op: triton on meta': (
        lambda: attend(device='meta', impl='triton'),
        "impl='triton' can't run: .* the input is on meta",
    ),
    'backbone: arch name': (lambda: backbone(arch='huge'), "arch must be one of .*, got 'huge'"),
    'backbone: arch key': (lambda: arch(width=3), "arch must have the keys .*'width'"),
    'backbone: arch width': (
        lambda: arch(embed_dims=(8, -16)),
        r"arch\['embed_dims'\] must be .* got \(8, -16\)",
    ),
    'backbone: arch lengths': (lambda: arch(depths=(1,)), 'one entry per stage in each list'),
    'backbone: arch heads': (lambda: arch(num_heads=(3, 2)), 'multiples of num_heads, got 8 and 3'),
    'backbone: outputs': (lambda: backbone(out_indices=(0, 5)), r'out_indices must .* \(0, 5\)'),
    'backbone: norm': (lambda: backbone(norm_cfg=dict(type='BN')), 'norm_cfg must name a norm'),
    'backbone: drop path': (lambda: backbone(drop_path_rate=2), r'drop_path_rate must .* got 2'),
    'backbone: keyword': (lambda: backbone(drop_path=0.1), "unexpected keyword .*'drop_path'"),
    'backbone: one channel': (
        lambda: backbone()(torch.ones(1, 1, 8, 8)),
        r'input must have shape \(B, 3, H, W\), got \(1, 1, 8, 8\)',
    ),
    'backbone: no batch': (lambda: backbone()(torch.ones(3, 8, 8)), r'got \(3, 8, 8\)'),
    'backbone: no pixel': (lambda: backbone()(torch.ones(1, 3, 0, 8)), r'got \(1, 3, 0, 8\)'),
    'optimizer: no rate': (lambda: optimize(custom_keys={}), 'must be a dict with decay_rate'),
    'optimizer: option': (
        lambda: optimize(decay_rate=0.9, num_layers=3),
        r"paramwise_cfg must have keys of .* got \['num_layers'\]",
    ),
    'hook: option': (lambda: AtomicCheckpointHook(keep=3), 'options of CheckpointHook, got keep'),
}


@pytest.mark.parametrize('name', LIBRARY)
def test_library(name):
    call, message = LIBRARY[name]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as error:
        call()
    assert '\n' not in str(error.value)


class Code:
    """Makes a file when it is unpickled without restrictions."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


def checkpoint_files(folder):
    whole = folder / 'whole.pth'
    torch.save({'w': torch.ones(1000)}, whole)
    contents = {
        'cut': whole.read_bytes()[:-100],
        'empty': b'',
        'text': b'<html>404</html>',
    }
    for name, content in contents.items():
        (folder / f'{name}.pth').write_bytes(content)
    torch.save({'w': torch.ones(1), 'x': Code(folder / 'ran')}, folder / 'code.pth')
    torch.save([torch.ones(1)], folder / 'list.pth')
    return folder


# A file, and the error about it.
CHECKPOINTS = {
    'cut': 'can not be read: it is truncated, damaged, or no file of torch.save',
    'empty': 'can not be read',
    'text': 'can not be read',
    'code': 'is refused: it holds posix.system',
    'list': 'is no checkpoint of a model: expected a dict of tensors, got list',
    'whole': "no weight that fits Linear under prefix='backbone.'",
    'none': 'does not exist: check the path',
}


@pytest.mark.parametrize('name', CHECKPOINTS)
def test_checkpoints(tmp_path, name):
    path = checkpoint_files(tmp_path) / f'{name}.pth'
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=CHECKPOINTS[name]) as error:
        load_weights(module, path, prefix='backbone.')
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(str(path))
    assert torch.equal(module.weight, before)
    assert not (tmp_path / 'ran').exists()


class World:
    """A folder with data, configs and checkpoints, which a case may damage before a tool runs."""

    def __init__(self, folder, data, configs):
        self.folder = folder
        self.data = shutil.copytree(data, folder / 'data')
        for kind, path in configs.items():
            text = path.read_text().replace(str(data), str(self.data))
            (folder / f'{kind}.py').write_text(text)
        checkpoint_files(folder)
        (folder / 'work').mkdir()
        shutil.copy(folder / 'whole.pth', folder / 'work/iter_1.pth')
        (folder / 'file').touch()

    def path(self, name):
        return str(self.folder / name)

    def train(self, kind, *options, work='work'):
        return 'train', self.path(f'{kind}.py'), '--work-dir', self.path(work), *options

    def change(self, kind, *settings):
        return self.train(kind, '--cfg-options', *settings)

    def write(self, name, content):
        (self.folder / name).write_text(content)
        return self

    def spoil(self, name, content=b''):
        path = self.data / name
        assert path.is_file()
        path.write_bytes(content)
        return self

    def test(self, kind, checkpoint, *options):
        arguments = (self.path(f'{kind}.py'), self.path(checkpoint), '--work-dir')
        return 'test', *arguments, self.path('work'), *options

    def infer(
        self, image='data/images/val/0.png', config='seg.py', checkpoint='fits.pth', *options
    ):
        if checkpoint == 'fits.pth':
            cfg = Config.fromfile(self.path('seg.py'))
            init_default_scope('mmseg')
            cfg.model.decode_head.norm_cfg.type = 'BN'
            model = MODELS.build(cfg.model)
            torch.save(dict(state_dict=model.state_dict()), self.path(checkpoint))
        named = ('--config', self.path(config), '--checkpoint', self.path(checkpoint))
        where = () if '--out-dir' in options else ('--out-dir', self.path('out'))
        return 'infer', self.path(image), *named, '--device', 'cpu', *where, *options

    def snapshot(self):
        return {path: path.read_bytes() for path in self.folder.rglob('*') if path.is_file()}


def coco(world, **changes):
    path = world.data / 'train.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return world


def empty_images(world):
    shutil.rmtree(world.data / 'images/train')
    (world.data / 'images/train').mkdir()
    return world


def wrong_labels(world, split='train', labels=77, shape=(32, 32)):
    for path in (world.data / f'labels/{split}').iterdir():
        cv2.imwrite(str(path), np.full(shape, labels, np.uint8))
    return world


def nothing_left(world):
    return world.write(
        'filtered.py',
        "_base_ = './det.py'\n"
        'pipeline = ['
        "    dict(type='LoadImageFromFile'),"
        "    dict(type='LoadAnnotations', with_bbox=True),"
        "    dict(type='FilterAnnotations', min_gt_bbox_wh=(99, 99)),"
        "    dict(type='PackDetInputs'),"
        ']\n'
        'train_dataloader = dict(dataset=dict(pipeline=pipeline, max_refetch=2))\n',
    )


def weights(world, kind, scope):
    """Weights that fit a config."""
    cfg = Config.fromfile(world.path(f'{kind}.py'))
    init_default_scope(scope)
    torch.save(MODELS.build(cfg.model).state_dict(), world.path('fits.pth'))
    return world


def half_jpeg(world):
    data = cv2.imencode('.jpg', np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    (world.folder / 'half.jpg').write_bytes(data[:60])
    return world


# The call of a tool, and its one line of error.
TOOLS = {
    'config: none': (lambda w: w.train('none'), r'none\.py'),
    'config: suffix': (
        lambda w: ('train', w.write('a.txt', '').path('a.txt')),
        'Only py/yml/yaml/json type are supported',
    ),
    'config: syntax': (
        lambda w: w.write('a.py', 'a = (').train('a'),
        r'a\.py is no Python: .*line 1',
    ),
    'config: empty': (
        lambda w: w.write('a.py', '').train('a'),
        r"a\.py must have an entry 'model', got None",
    ),
    'config: test without data': (
        lambda w: w.write('a.py', "model = dict(type='A')").test('a', 'whole.pth'),
        "must have an entry 'test_dataloader'",
    ),
    'config: model': (lambda w: w.change('seg', 'model=3'), 'model .*must be a dict|does not fit'),
    'config: unknown model': (
        lambda w: w.change('seg', 'model.backbone.type=saga_mm.SAGB'),
        'saga_mm.SAGB is not in',
    ),
    'config: unknown option': (
        lambda w: w.change('seg', 'model.backbone.drop_path=0.1'),
        "unexpected keyword argument 'drop_path'",
    ),
    'config: wrong option': (
        lambda w: w.change('seg', 'model.backbone.arch=huge'),
        "arch must be one of .* got 'huge'",
    ),
    'options: unknown entry': (
        lambda w: w.change('seg', 'optim_wraper.optimizer.lr=1'),
        "--cfg-options: .*has no entry 'optim_wraper'",
    ),
    'options: below a number': (
        lambda w: w.change('seg', 'train_cfg.max_iters.a=1'),
        '--cfg-options: train_cfg.max_iters.a=1 does not fit',
    ),
    'options: batch size': (
        lambda w: w.change('seg', 'train_dataloader.batch_size=x'),
        'batch_size',
    ),
    'options: rate': (
        lambda w: w.change('seg', 'optim_wrapper.optimizer.lr=fast'),
        r"TypeError: .*while building \w+\(.*lr='fast'",
    ),
    'options: length': (
        lambda w: w.change('seg', 'train_cfg.max_iters=long'),
        r"invalid literal for int.*\(while building IterBasedTrainLoop\(.*max_iters='long'",
    ),
    'options: classes': (
        lambda w: w.change('seg', 'model.decode_head.num_classes=many'),
        r"while building \w+\(.*num_classes='many'",
    ),
    'options: optimizer': (
        lambda w: w.change('seg', 'optim_wrapper.optimizer.type=AdamWW'),
        "optim_wrapper.optimizer.type: there is no 'AdamWW'; did you mean 'AdamW'",
    ),
    'options: metric': (
        lambda w: w.change('seg', 'default_hooks.checkpoint.save_best=nonsense'),
        'nonsense',
    ),
    'options: amp': (lambda w: w.train('seg', '--amp'), r'mixed precision \(--amp'),
    'launcher: not torchrun': (
        lambda w: w.train('seg', '--launcher', 'pytorch'),
        '--launcher pytorch is for processes that torchrun starts, and RANK is not set',
    ),
    'launcher: not srun': (
        lambda w: w.train('seg', '--launcher', 'slurm'),
        'for processes that srun starts, and SLURM_PROCID is not set',
    ),
    'strategy: runner': (
        lambda w: w.change('seg', 'strategy.type=FSDPStrategy'),
        "strategy FSDPStrategy needs runner_type='FlexibleRunner' in the config, got None",
    ),
    'strategy: other runner': (
        lambda w: w.change('seg', 'strategy.type=FSDPStrategy', 'runner_type=Runner'),
        "needs runner_type='FlexibleRunner' in the config, got 'Runner'",
    ),
    'strategy: CPU': (
        lambda w: w.change('seg', 'strategy.type=FSDPStrategy', 'runner_type=FlexibleRunner'),
        'strategy FSDPStrategy of mmengine needs a GPU, and there is none',
    ),
    'options: lr': (lambda w: w.train('seg', '--auto-scale-lr'), 'needs auto_scale_lr.base_batch'),
    'work dir: below a file': (
        lambda w: w.train('seg', work='file/a'),
        'Not a directory: .*file/a',
    ),
    'work dir: a file': (lambda w: w.train('seg', work='file'), 'File exists: .*file'),
    'work dir: empty': (
        lambda w: w.train('seg', work='')[:2] + ('--work-dir', ''),
        "--work-dir must not be empty, got '': is a variable unset",
    ),
    'length: none': (
        lambda w: w.change('seg', 'train_cfg.max_iters=-1'),
        'train_cfg.max_iters must be at least 1, got -1',
    ),
    'length: no epoch': (
        lambda w: w.change('det', 'train_cfg.max_epochs=0'),
        'train_cfg.max_epochs must be at least 1, got 0',
    ),
    'length: validation': (
        lambda w: w.change('seg', 'train_cfg.val_interval=0'),
        'train_cfg.val_interval must be at least 1, got 0',
    ),
    'resume: empty': (
        lambda w: w.train('seg', '--resume', ''),
        "--resume must not be empty, got '': is a variable unset",
    ),
    'resume: nothing': (
        lambda w: w.train('seg', '--resume', work='new'),
        'nothing to resume: .*new has no checkpoint',
    ),
    'resume: nothing whole': (
        lambda w: w.train('seg', '--resume'),
        'nothing to resume: .*last_checkpoint is missing',
    ),
    'resume: weights': (
        lambda w: w.train('seg', '--resume', w.path('whole.pth')),
        r'whole\.pth can not be resumed: it holds weights, but no',
    ),
    'resume: code': (
        lambda w: w.train('seg', '--resume', w.path('code.pth')),
        r'code\.pth is refused',
    ),
    'load_from: empty': (lambda w: w.change('seg', 'load_from='), 'load_from must not be empty'),
    'load_from: other model': (
        lambda w: w.change('seg', f'load_from={w.path("whole.pth")}'),
        r'whole\.pth does not fit the model of the config, weights: 0 loaded',
    ),
    'data: none': (
        lambda w: w.change('seg', 'train_dataloader.dataset.data_root=/none'),
        'no data for BaseSegDataset: the folder /none is missing',
    ),
    'data: no images': (
        lambda w: empty_images(w).train('det'),
        'the folder .*images/train is empty',
    ),
    'data: other suffix': (
        lambda w: w.change('seg', 'train_dataloader.dataset.img_suffix=.tif'),
        r'images/train has no \*\.tif',
    ),
    'data: empty annotations': (
        lambda w: w.spoil('train.json').train('det'),
        'train.json is empty',
    ),
    'data: cut annotations': (
        lambda w: w.spoil('train.json', b'{"images": [').train('det'),
        r'\(while reading .*train\.json\)',
    ),
    'data: list of annotations': (
        lambda w: w.spoil('train.json', b'[]').train('det'),
        r'\(while reading .*train\.json\)',
    ),
    'data: no annotations': (
        lambda w: coco(w, annotations=[]).change('det', FILTER),
        'must have at least one image .* got none from CocoDataset',
    ),
    'data: other classes': (
        lambda w: w.change('det', FILTER, "train_dataloader.dataset.metainfo.classes=('x','y')"),
        r"at least one image with labels of its classes, .* for classes=\('x', 'y'\)",
    ),
    'data: no image': (
        lambda w: w.spoil('images/train/0.png').change('seg', ALL),
        r'while reading .*images/train/0\.png',
    ),
    'data: no label map': (
        lambda w: w.spoil('labels/train/0.png', b'a').change(
            'seg', 'train_dataloader.batch_size=6'
        ),
        r'while reading .*images/train/0\.png and .*labels/train/0\.png',
    ),
    'data: in a worker': (
        lambda w: w.spoil('images/train/0.png', b'a').change(
            'seg', ALL, 'train_dataloader.num_workers=1'
        ),
        'while reading data in a worker; with num_workers=0 the file is named',
    ),
    'data: label out of range': (
        lambda w: wrong_labels(w).train('seg'),
        r'labels must be from 0 to 1 .* got 77 for .*labels/train',
    ),
    'data: more classes than the model': (
        lambda w: w.change('det', 'model.bbox_head.num_classes=1'),
        r'labels must be from 0 to 0 .* got 1 for .*images/train',
    ),
    'data: label out of range in validation': (
        lambda w: wrong_labels(w, 'val').train('seg'),
        r'labels must be from 0 to 1 .* got 77 for .*labels/val',
    ),
    'data: colour label maps': (
        lambda w: wrong_labels(w, shape=(32, 32, 3)).train('seg'),
        r'a label map must have one channel, .* got 3 channels, .* for .*labels/train',
    ),
    'data: colour label maps in validation': (
        lambda w: wrong_labels(w, 'val', shape=(32, 32, 3)).train('seg'),
        r'a label map must have one channel, .* got 3 channels, .* for .*labels/val',
    ),
    'data: classes as text': (
        lambda w: w.change('det', 'train_dataloader.dataset.metainfo.classes=a'),
        r"metainfo.classes must be a tuple of names, got the text 'a': write \('a',\)",
    ),
    'data: classes of label maps as text': (
        lambda w: w.change('seg', 'train_dataloader.dataset.metainfo.classes=ab'),
        "metainfo.classes must be a tuple of names, got the text 'ab'",
    ),
    'data: head of more classes': (
        lambda w: w.change('det', 'model.bbox_head.num_classes=80'),
        r'bbox_head has num_classes=80, and val_dataloader has data of 2 \(a, b\): set',
    ),
    'data: other names': (
        lambda w: w.change('det', "train_dataloader.dataset.metainfo.classes=('A','B')"),
        r"no class is a category .*classes=\('A', 'B'\), and the categories of .*json are a, b",
    ),
    'data: other names, filtered': (
        lambda w: w.change('det', FILTER, "train_dataloader.dataset.metainfo.classes=('A','B')"),
        r"at least one image .*classes=\('A', 'B'\), and the categories of .*json are a, b",
    ),
    'data: no masks': (
        lambda w: w.change('det', 'train_dataloader.dataset.pipeline.1.with_mask=True'),
        r'an object has no mask .* \(while reading .*images/train/.*\)',
    ),
    'data: no masks, in a worker': (
        lambda w: w.change(
            'det',
            'train_dataloader.dataset.pipeline.1.with_mask=True',
            'train_dataloader.num_workers=1',
        ),
        'an object has no mask',
    ),
    'data: nothing left': (
        lambda w: nothing_left(w).train('filtered'),
        'Cannot find valid image .* whether the classes of the data set have the names',
    ),
    'config: pretrained': (
        lambda w: w.change('seg', 'model.pretrained=open-mmlab://resnet50_v1c'),
        'model.pretrained of a base config is for .* set pretrained=None in model',
    ),
    'test: label out of range': (
        lambda w: weights(wrong_labels(w, 'val'), 'seg', 'mmseg').test('seg', 'fits.pth'),
        r'labels must be from 0 to 1 .* got 77 for .*labels/val',
    ),
    'test: label map of another size': (
        lambda w: weights(wrong_labels(w, 'val', 1, (30, 40)), 'seg', 'mmseg').test(
            'seg', 'fits.pth'
        ),
        r'\(while evaluating .*images/val/0\.png and .*labels/val/0\.png\)',
    ),
    'test: head of more classes': (
        lambda w: weights(w, 'det', 'mmdet').test(
            'det',
            'fits.pth',
            '--cfg-options',
            "test_dataloader.dataset.metainfo.classes=('b',)",
        ),
        r'bbox_head has num_classes=2, and test_dataloader has data of 1 \(b\): set',
    ),
    'test: other model': (lambda w: w.test('seg', 'whole.pth'), 'does not fit the model'),
    'test: no checkpoint': (lambda w: w.test('seg', 'none.pth'), r'none\.pth does not exist'),
    'test: empty checkpoint': (
        lambda w: ('test', w.path('seg.py'), ''),
        'checkpoint must not be empty',
    ),
    'test: empty output': (
        lambda w: w.test('seg', 'whole.pth', '--out', ''),
        '--out must not be empty',
    ),
    'test: output': (
        lambda w: w.test('seg', 'whole.pth', '--out', w.path('a.json')),
        r'--out must end in \.pkl or \.pickle, got .*a\.json',
    ),
    'test: output folder': (
        lambda w: w.test('seg', 'whole.pth', '--out', w.path('file/a.pkl')),
        'File exists: .*file',
    ),
    'test: augmentation': (
        lambda w: w.test('det', 'whole.pth', '--tta'),
        '--tta needs tta_model and tta_pipeline',
    ),
    'infer: no image': (
        lambda w: w.infer('none.png', 'seg.py', 'whole.pth'),
        r'no such image: .*none\.png',
    ),
    'infer: no images': (
        lambda w: w.infer('work', 'seg.py', 'whole.pth'),
        'no images in the folder .*work',
    ),
    'infer: no config': (lambda w: w.infer('file', 'none.py', 'whole.pth'), r'none\.py'),
    'infer: empty config': (
        lambda w: w.write('a.py', '').infer('file', 'a.py', 'whole.pth'),
        "must have an entry 'model'",
    ),
    'infer: other model': (
        lambda w: w.infer('file', 'seg.py', 'whole.pth'),
        'does not fit the model',
    ),
    'infer: threshold': (
        lambda w: w.infer('work', 'seg.py', 'whole.pth', '--score-thr', '2'),
        r'score-thr must be in \[0, 1\), got 2\.0',
    ),
    'infer: device': (
        lambda w: w.infer('data/images/val', 'seg.py', 'whole.pth', '--device', 'abacus'),
        "device 'abacus' is not available",
    ),
    'infer: output is a file': (
        lambda w: w.infer('half.jpg', 'seg.py', 'fits.pth', '--out-dir', half_jpeg(w).path('file')),
        'File exists: .*file',
    ),
    'infer: broken image': (
        lambda w: half_jpeg(w).infer('half.jpg'),
        r'not readable as an image: .*half\.jpg',
    ),
}


@pytest.fixture
def world(tmp_path, tiny_data, tiny_seg, tiny_det):
    return World(tmp_path / 'world', tiny_data, dict(seg=tiny_seg, det=tiny_det))


@pytest.fixture(autouse=True)
def quick_start(monkeypatch, tmp_path):
    """Skips the steps for which mmengine starts other programs, and hides GPUs."""
    monkeypatch.setattr('mmengine.runner.runner.get_git_hash', str)
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('name', TOOLS)
def test_tools(tool, world, monkeypatch, name):
    arguments, message = TOOLS[name]
    script, *arguments = arguments(world)
    before = world.snapshot()
    main = tool(script).main
    monkeypatch.setattr('saga_mm.apis.runs.get_device', lambda: 'cpu')
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    # `sys.exit(message)` prints the message, and the status is 1
    line = stop.value.code
    assert isinstance(line, str), line
    assert line.startswith('error: ')
    assert '\n' not in line
    assert 'Traceback' not in line
    assert re.search(message, line), line
    after = world.snapshot()
    assert all(after.get(path) == content for path, content in before.items())
    # At most logs and the config of the run are new.
    new = {path.suffix for path in after.keys() - before.keys()}
    assert new <= {'.log', '.json', '.py', '.pyc'}, new


def test_full_disk(tool, world):
    # A limit on the size of files takes the place of a full disk.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = world.snapshot()
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, limits[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            tool('train').main([*world.train('seg')[1:]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == f'error: File too large: {world.path("work/iter_2.pth")}'
    after = world.snapshot()
    assert all(after.get(path) == content for path, content in before.items())
    assert {path.suffix for path in after.keys() - before.keys()} <= {'.log', '.json', '.py'}


def test_torchrun_without_launcher(tool, world, monkeypatch):
    before = world.snapshot()
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '4')
    with pytest.raises(SystemExit) as stop:
        tool('train').main([*world.train('seg')[1:]])
    assert stop.value.code.startswith(
        'error: --launcher is none, and torchrun has started 4 processes'
    )
    assert world.snapshot() == before


def test_debug_shows_the_traceback(tool, world):
    script, *arguments = world.infer('none.png', 'seg.py', 'whole.pth')
    with pytest.raises(ValueError, match='no such image'):
        tool(script).main([*arguments, '--debug'])
