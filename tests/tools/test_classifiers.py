"""Classifiers of mmpretrain: training, testing, prediction, FLOPs, and what starts from them.

mmpretrain is no part of the environment of the tests. It is installed once into a folder of its
own, with a torchvision of which only the transforms are used.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from saga_mm.backbones import SAGA
from saga_mm.datasets.scenes import make_scenes

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / '.cache' / 'pretrain'
PACKAGES = ('onedl-mmpretrain==1.3.6', 'model-index', 'einops', 'mat4py', 'markdown', 'ordered-set')
CONFIG = 'configs/classification/classifier_saga_t_tiny_imagenet50.py'
CLASSES = ('dark', 'grey', 'bright')
OPTIONS = [
    'train_cfg.max_epochs=2',
    'train_cfg.val_interval=2',
    'train_dataloader.batch_size=6',
    'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0',
    'test_dataloader.num_workers=0',
    'model.data_preprocessor.num_classes=3',
    'model.head.num_classes=3',
    'model.head.topk=(1,)',
    'val_evaluator.topk=(1,)',
    'test_evaluator.topk=(1,)',
]


@pytest.fixture(scope='session')
def environment():
    """Environment variables with which mmpretrain can be imported."""
    version = torch.__version__.partition('+')[0].split('.')
    torchvision = f'torchvision==0.{int(version[1]) + 15}.*'
    if not SITE.exists():
        # Several processes may run tests: the folder gets its name when it is complete.
        SITE.parent.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=SITE.parent))
        command = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', folder]
        subprocess.run([*command, *PACKAGES, torchvision], check=True)
        with contextlib.suppress(OSError):
            folder.rename(SITE)
        shutil.rmtree(folder, ignore_errors=True)
    folders = (ROOT / 'tests' / 'torchvision_without_ops', SITE)
    path = os.pathsep.join([*map(str, folders), os.environ.get('PYTHONPATH', '')])
    return {**os.environ, 'PYTHONPATH': path}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Images of three classes, which differ in brightness."""
    root = tmp_path_factory.mktemp('images')
    generator = np.random.default_rng(0)
    for split, number in (('train', 8), ('val', 2)):
        for i, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for j in range(number):
                image = generator.integers(80 * i, 80 * i + 60, (64, 64, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f'{j}.png'), image)
    return root


@pytest.fixture(scope='module')
def run(environment, data):
    def run(name, *arguments, options=OPTIONS):
        command = [sys.executable, f'tools/{name}.py', *map(str, arguments)]
        return subprocess.run(
            [*command, '--cfg-options', *options],
            cwd=ROOT,
            env={**environment, 'DATA_ROOT': str(data)},
            capture_output=True,
            text=True,
        )

    return run


def test_from_images_to_the_backbone_of_a_detector_or_segmentor(run, data, tmp_path):
    done = run('train', CONFIG, '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / 'epoch_2.pth'

    done = run('test', CONFIG, checkpoint, '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'accuracy/top1' in done.stdout + done.stderr

    image = data / 'val' / 'bright' / '0.png'
    where = ('--config', CONFIG, '--checkpoint', checkpoint, '--out-dir', tmp_path)
    done = run('infer', image, *where)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout.splitlines()[-1] for name in CLASSES)

    trained = torch.load(checkpoint, weights_only=False)['state_dict']
    backbone = SAGA(
        init_cfg=dict(type='Pretrained', checkpoint=str(checkpoint), prefix='backbone.')
    )
    backbone.init_weights()
    # A classifier has no norms of the first three maps.
    new = ('norms.0.', 'norms.1.', 'norms.2.')
    for name, value in backbone.state_dict().items():
        assert name.startswith(new) or torch.equal(value, trained[f'backbone.{name}']), name


def test_demo_compares_segmentors_with_and_without_a_classifier(environment, tmp_path):
    make_scenes(tmp_path / 'scenes', train=2, val=1, size=(64, 96), progress=False)
    options = [
        '--cfg-options',
        'train_dataloader.batch_size=2',
        'model.backbone.qk_norm=(2.0,-4.0)',
    ]
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/demo.py', '--pretrain', '--max-iters=1', *options],
        cwd=tmp_path,
        env={**environment, 'DATA_ROOT': str(tmp_path / 'scenes')},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r'^classifier: \d+\.\d % of the objects of scenes', done.stdout, re.M)
    report = r'^from \S+/classifier/epoch_5\.pth into the backbone: (\d+) loaded, 6 missing'
    loaded = re.search(report, done.stdout, re.M)[1]
    for name in ('scratch', 'the classifier'):
        assert re.search(rf'^from {name}: mIoU \d+\.\d on 1 scenes', done.stdout, re.M)
    folder = tmp_path / 'work_dirs/demo'
    assert (folder / 'iter_1.pth').is_file() and (folder / 'pretrained/scenes.png').is_file()
    log = ''.join(path.read_text() for path in folder.glob('pretrained/*/*.log'))
    assert f'epoch_5.pth, weights: {loaded} loaded, 6 missing' in log
    assert 'epoch_5.pth' not in ''.join(path.read_text() for path in folder.glob('2*/*.log'))


@pytest.mark.long
def test_documented_start_from_pvt(environment, data, tmp_path):
    page = (ROOT / 'docs/pretraining.md').read_text()
    (commands,) = re.findall(r'```bash\nexport DATA_ROOT=.*?\n(.*?)```', page, re.DOTALL)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    done = subprocess.run(
        ['bash', '-e', '-c', commands],
        cwd=tmp_path,
        env={**environment, 'DATA_ROOT': str(data), 'PATH': path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    log = ''.join(path.read_text() for path in tmp_path.glob('work_dirs/warm/*/*.log'))
    start = torch.load(tmp_path / 'work_dirs/start.pth')
    # the heads are alike, and are converted as well
    assert 'head.fc.weight' in start
    assert f'start.pth, weights: {len(start)} loaded' in log
    for name, epoch in dict(pvt=3, warm=3, scratch=6).items():
        assert (tmp_path / 'work_dirs' / name / f'epoch_{epoch}.pth').is_file()


def test_flops_are_counted(run):
    done = run('get_flops', CONFIG, '--size', 64, 64)
    assert done.returncode == 0, done.stderr
    assert '| head |' in done.stdout


def test_labels_are_held_against_the_head(run, tmp_path):
    options = [*OPTIONS, 'model.head.num_classes=2']
    done = run('train', CONFIG, '--work-dir', tmp_path, options=options)
    assert done.returncode != 0
    wrong = 'labels must be from 0 to 1 for the head (or -100 to be ignored), got 2 for '
    assert wrong in done.stderr
