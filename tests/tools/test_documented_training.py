"""What README and documentation say to train runs in two processes, without a GPU.

The data is small, and the models are as documented.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from saga_mm import configs_dir
from saga_mm.checkpoint import load_file
from saga_mm.datasets.scenes import make_scenes

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'configs/README.md', *sorted(ROOT.glob('docs/**/*.md'))]
# `DistributedDataParallel` finds a missing gradient at the second iteration.
TRAIN, VAL = 8, 2
COMMON = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
EPOCHS = ['train_cfg.max_epochs=1', 'train_cfg.val_interval=5']
ITERATIONS = ['train_cfg.max_iters=2', 'train_cfg.val_interval=5']
PIPELINE = 'train_dataloader.dataset.pipeline'
SMALL_BOXES = [f'{PIPELINE}.2.scale=(128,96)']
SMALL_CROPS = [f'{PIPELINE}.3.crop_size=(96,96)', 'model.data_preprocessor.size=(96,96)']
# for each data set: the layout of scenes that replaces it, its folder, and options
REPLACED = {
    'CocoDataset': ('coco', 'data/coco', EPOCHS + SMALL_BOXES),
    'ADE20KDataset': ('ade20k', 'data/ade/ADEChallengeData2016', ITERATIONS + SMALL_CROPS),
    'saga_mm.ScenesSegDataset': ('scenes', 'data/scenes', ITERATIONS),
}


def written_configs():
    """Each config that a page writes out, by the name of the page and its number there."""
    found = {}
    for page in PAGES:
        blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
        blocks = [block for block in blocks if '_base_ = ' in block]
        found.update({f'{page.stem}-{i}': block for i, block in enumerate(blocks)})
    return found


def named_configs():
    """Each config that a command on a page trains, if the tests can make its data."""
    text = '\n'.join(page.read_text() for page in PAGES)
    text = text.replace('\\\n    ', '')
    names = set(re.findall(r'-m saga_mm train (saga_mm::\S+\.py)', text))
    assert len(names) > 5
    # classifiers are trained by test_classifiers.py
    return sorted(
        name for name in names if not re.search('camvid|cityscapes|nuclei|classification', name)
    )


def dataset_of(cfg):
    dataset = cfg.train_dataloader.dataset
    return dataset.get('dataset', dataset)


@pytest.fixture
def train_in_two_processes(tmp_path):
    def train(config):
        file = str(config).replace('saga_mm::', f'{configs_dir()}/')
        layout, folder, options = REPLACED[dataset_of(Config.fromfile(file)).type]
        make_scenes(tmp_path / folder, layout, TRAIN, VAL, (96, 128))
        environ = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'kernels'))),
            'CUDA_VISIBLE_DEVICES': '',
            'OMP_NUM_THREADS': '1',
        }
        port = ['--master-port', str(30000 + os.getpid() % 10000)]
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', *port]
        train = ['-m', 'saga_mm', 'train', config, '--launcher', 'pytorch', '--work-dir', 'work']
        result = subprocess.run(
            [*torchrun, *train, '--cfg-options', *COMMON, *options],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        (file,) = (tmp_path / 'work').glob('*.pth')
        return load_file(file)

    return train


@pytest.mark.parametrize('text', written_configs().values(), ids=written_configs())
def test_written_configs_train(text, train_in_two_processes, tmp_path):
    (tmp_path / 'config.py').write_text(text)
    checkpoint = train_in_two_processes(tmp_path / 'config.py')
    assert checkpoint['meta']['iter'] == TRAIN // 4


@pytest.mark.long
@pytest.mark.parametrize('name', named_configs())
def test_named_configs_train(name, train_in_two_processes):
    assert train_in_two_processes(name)['meta']['iter'] >= 2
