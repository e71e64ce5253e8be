import contextlib
import pickle
import resource
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, init_default_scope

from saga_mm.checkpoint import write_atomically


@pytest.fixture
def run(tool, tmp_path):
    """Runs tools/test.py on new weights of a config."""

    def test(config, *options):
        cfg = Config.fromfile(config)
        init_default_scope(cfg.default_scope)
        path = tmp_path / 'weights.pth'
        torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, path)
        work_dir = ['--work-dir', str(tmp_path / 'work')]
        return tool('test').main([str(config), str(path), *work_dir, *map(str, options)])

    return test


def predictions(path):
    # The tool wrote this file in the test, so it is safe to unpickle.
    with open(path, 'rb') as file:
        return pickle.load(file)


def test_segmentation(run, tiny_seg, tiny_data, tmp_path):
    out, drawings = tmp_path / 'out' / 'a.pkl', tmp_path / 'drawings'
    metrics = run(tiny_seg, '--out', out, '--show-dir', drawings)
    assert 0 <= metrics['mIoU'] <= 100
    found = predictions(out)
    assert [Path(sample['img_path']).name for sample in found] == ['0.png', '1.png']
    assert found[0]['pred_sem_seg']['data'].shape == (1, 32, 32)
    # The metric is that of the predictions.
    hits = [
        (sample['pred_sem_seg']['data'][0].numpy() == cv2.imread(sample['seg_map_path'], 0)).mean()
        for sample in found
    ]
    assert metrics['aAcc'] == pytest.approx(100 * np.mean(hits), abs=0.01)
    assert len(list(drawings.rglob('*.png'))) == 2
    assert not list(drawings.glob('.*'))


def test_a_checkpoint_without_the_head_of_the_training(tool, tiny_seg, tmp_path):
    cfg = Config.fromfile(tiny_seg)
    init_default_scope(cfg.default_scope)
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, tmp_path / 'weights.pth')
    config = tiny_seg.with_name('auxiliary.py')
    config.write_text(
        f"_base_ = './{tiny_seg.name}'\n"
        "model = dict(auxiliary_head=dict(type='FCNHead', in_channels=8, in_index=0, channels=8,\n"
        "    num_convs=1, num_classes=2, norm_cfg=dict(type='BN')))\n"
    )
    work_dir = ['--work-dir', str(tmp_path / 'work')]
    metrics = tool('test').main([str(config), str(tmp_path / 'weights.pth'), *work_dir])
    assert 0 <= metrics['mIoU'] <= 100


def test_detection(run, tiny_det, tmp_path):
    out, drawings = tmp_path / 'a.pkl', tmp_path / 'drawings'
    metrics = run(tiny_det, '--out', out, '--show-dir', drawings)
    assert -1 <= metrics['coco/bbox_mAP'] <= 1
    found = predictions(out)
    assert [sample['img_id'] for sample in found] == [0, 1]
    assert found[0]['pred_instances']['bboxes'].shape == (5, 4)
    assert sorted(path.name for path in drawings.iterdir()) == ['0.png', '1.png']


def test_augmentation_changes_the_predictions(run, tiny_seg, tmp_path):
    out = tmp_path / 'a.pkl'
    torch.manual_seed(0)
    run(tiny_seg, '--out', out)
    plain = predictions(out)[0]['pred_sem_seg']['data']
    torch.manual_seed(0)
    run(tiny_seg, '--out', out, '--tta')
    assert (predictions(out)[0]['pred_sem_seg']['data'] != plain).any()


WRAPPED = {
    'concatenated': "dict(type='ConcatDataset', datasets=[one, one])",
    'repeated': "dict(type='RepeatDataset', times=2, dataset=one)",
    'nested': (
        "dict(type='RepeatDataset', times=1, dataset=dict(type='ConcatDataset', datasets=[one]))"
    ),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_augmentation_reaches_data_sets_in_wrappers(run, tiny_seg, tmp_path, name):
    with tiny_seg.open('a') as file:
        file.write(
            "one = val_dataloader['dataset']\n"
            f'test_dataloader = dict(val_dataloader, dataset={WRAPPED[name]})\n'
        )
    out = tmp_path / 'a.pkl'
    run(tiny_seg, '--out', out, '--tta')
    assert len(predictions(out)) == (2 if name == 'nested' else 4)


def test_pure_python_config(run, tiny_det, tmp_path):
    config = tiny_det.with_name('pure.py')
    config.write_text(
        'from mmdet.engine.hooks import DetVisualizationHook\n'
        'from mmdet.models import RetinaNet\n'
        'from mmengine.config import read_base\n'
        f'with read_base():\n    from .{tiny_det.stem} import *\n'
        'default_hooks.update(visualization=dict(type=DetVisualizationHook))\n'
        'model.update(type=RetinaNet)\n'
    )
    drawings = tmp_path / 'drawings'
    metrics = run(config, '--out', tmp_path / 'a.pkl', '--show-dir', drawings)
    assert 'coco/bbox_mAP' in metrics
    assert len(predictions(tmp_path / 'a.pkl')) == 2
    assert len(list(drawings.iterdir())) == 2


@pytest.mark.parametrize('config', ['tiny_seg', 'tiny_det'])
def test_a_full_disk_leaves_the_old_drawings(run, config, request, tmp_path, monkeypatch):
    config = request.getfixturevalue(config)
    drawings = tmp_path / 'drawings'
    run(config, '--show-dir', drawings)
    before = {path: path.read_bytes() for path in drawings.rglob('*.png')}
    assert len(before) == 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    imencode, imwrite = cv2.imencode, cv2.imwrite

    def limited(write):
        def call(*args, **kwargs):
            # A limit on the size of files takes the place of a full disk.
            size = min(map(len, before.values())) // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            return write(*args, **kwargs)

        return call

    monkeypatch.setattr(cv2, 'imencode', limited(imencode))
    monkeypatch.setattr(cv2, 'imwrite', limited(imwrite))
    try:
        # The visualizer of mmseg does not look at what OpenCV answers.
        with contextlib.suppress(SystemExit):
            run(config, '--show-dir', drawings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in drawings.rglob('*.png')} == before


def test_a_full_disk_leaves_the_old_predictions(run, tiny_det, tmp_path, monkeypatch):
    out = tmp_path / 'out' / 'a.pkl'
    run(tiny_det, '--out', out)
    before = out.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(path, data):
        # A limit on the size of files takes the place of a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        write_atomically(path, data)

    monkeypatch.setattr('saga_mm.apis.runs.write_atomically', fill)
    try:
        with pytest.raises(SystemExit) as stop:
            run(tiny_det, '--out', out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stop.value.code == f'error: File too large: {out}'
    assert out.read_bytes() == before
    assert list(out.parent.iterdir()) == [out]


def test_mistakes_are_one_line(run, tiny_det, tiny_seg, tmp_path):
    def failure(*arguments):
        with pytest.raises(SystemExit) as exit_:
            run(*arguments)
        assert '\n' not in exit_.value.code
        return exit_.value.code

    assert (
        failure(tiny_det, '--tta') == 'error: --tta needs tta_model and tta_pipeline in the config'
    )
    assert '--out must end in .pkl' in failure(tiny_seg, '--out', 'a.json')
    option = ('--cfg-options', 'default_hooks.visualization=None')
    folder = tmp_path / 'drawings'
    assert '--show-dir needs default_hooks' in failure(tiny_seg, '--show-dir', folder, *option)
    option = ('--cfg-options', 'test_dataloader.dataset.data_root=/nowhere')
    assert 'no data for BaseSegDataset: the folder /nowhere' in failure(tiny_seg, *option)
    # These weights are not those of the config.
    option = ('--cfg-options', 'model.decode_head.num_classes=3')
    assert 'does not fit the model of the config' in failure(tiny_seg, *option)


@pytest.mark.parametrize(
    'content',
    [
        lambda weights: {'model': weights, 'epoch': 3},
        lambda weights: {'model': {f'module._orig_mod.{name}': w for name, w in weights.items()}},
    ],
)
def test_the_weights_that_were_checked_are_those_that_are_tested(
    tool, tiny_seg, tmp_path, monkeypatch, content
):
    cfg = Config.fromfile(tiny_seg)
    init_default_scope(cfg.default_scope)
    weights = MODELS.build(cfg.model).state_dict()
    torch.save(content(weights), tmp_path / 'a.pth')
    runners = []
    build = RUNNERS.build

    def keep(cfg):
        runners.append(build(cfg))
        return runners[0]

    monkeypatch.setattr('saga_mm.apis.runs.RUNNERS.build', keep)
    options = ['--work-dir', str(tmp_path / 'work')]
    tool('test').main([str(tiny_seg), str(tmp_path / 'a.pth'), *options])
    loaded = runners[0].model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())
