"""tools/demo.py: two iterations on a handful of small scenes, and the picture it draws."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import PixelData

from saga_mm.analysis.scenes import draw_scenes
from saga_mm.datasets.scenes import PALETTE, make_scenes

ROOT = Path(__file__).parents[2]
PICTURE = (720, 1680, 3)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scenes')
    make_scenes(folder, 'scenes', train=4, val=7, size=(64, 96))
    return folder


@pytest.fixture
def demo(tool):
    return tool('demo')


def arguments(scenes, work_dir, iterations):
    options = [f'{part}_dataloader.dataset.data_root={scenes}' for part in ('train', 'val', 'test')]
    options += ['train_dataloader.batch_size=2']
    return [f'--work-dir={work_dir}', f'--max-iters={iterations}', '--cfg-options', *options]


def colors_in(picture):
    """Number of pixels of each colour of the palette."""
    return [int((picture[..., ::-1] == color).all(axis=2).sum()) for color in PALETTE]


def test_demo_trains_evaluates_and_draws_then_goes_on(scenes, tmp_path, demo, capsys):
    work_dir = tmp_path / 'demo'
    command = [sys.executable, str(ROOT / 'tools/demo.py'), *arguments(scenes, work_dir, 2)]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    result, picture, *commands = first.stdout.splitlines()[-6:]
    miou = re.fullmatch(r'mIoU (\d+\.\d) on 7 scenes never trained on, after \d+\.\d min', result)
    # The log files have what is not printed.
    assert len(first.stdout.splitlines()) < 40, first.stdout
    assert re.search(
        r'^training: 2 of 2 iterations, loss \d+\.\d\d, 0\.0 min left$', first.stdout, re.M
    )
    assert 'test: 7 of 7 iterations, ' in first.stdout
    log = ''.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))
    assert 'SegDataPreProcessor' in log
    *_, evaluated = re.findall(r' mIoU: (\S+)', log)
    assert float(miou[1]) == pytest.approx(float(evaluated), abs=0.051)
    assert picture == f'picture: {work_dir / "scenes.png"}'
    image = cv2.imread(str(work_dir / 'scenes.png'))
    assert image.shape == PICTURE
    # A patch of the legend has fewer pixels than the objects in the truth.
    assert sorted(colors_in(image))[5] > 2000
    for line in commands[1:]:
        command, *files = re.findall(r'-m saga_mm \w+|\S+\.py|\S+\.pth|\S+/images/val', line)
        assert command in ('-m saga_mm infer', '-m saga_mm train')
        assert files and all((tmp_path / name).exists() for name in files), line

    # A finished training is found and not repeated.
    before = (work_dir / 'iter_2.pth').stat().st_mtime_ns
    demo.main(arguments(scenes, work_dir, 2))
    second = capsys.readouterr().out
    assert f'going on from {work_dir}/iter_2.pth' in second
    assert f'mIoU {miou[1]} on 7 scenes' in second
    assert (work_dir / 'iter_2.pth').stat().st_mtime_ns == before

    # A training that is not finished is continued.
    demo.main(arguments(scenes, work_dir, 3))
    assert (work_dir / 'iter_3.pth').is_file()


class Truthful:
    """A stand-in for a model, which predicts the truth, and class 1 where there is no label."""

    def test_step(self, data):
        (sample,) = data['data_samples']
        labels = sample.gt_sem_seg.data.clone()
        labels[labels == 0] = 1
        sample.pred_sem_seg = PixelData(data=labels)
        return [sample]


def test_picture_shows_image_truth_and_prediction(scenes, tmp_path):
    init_default_scope('mmseg')
    pipeline = [dict(type=name) for name in ('LoadImageFromFile', 'LoadAnnotations')]
    dataset = DATASETS.build(
        dict(
            type='saga_mm.ScenesSegDataset',
            data_root=str(scenes),
            split='val',
            pipeline=[*pipeline, dict(type='PackSegInputs')],
        )
    )
    path = tmp_path / 'scenes.png'
    draw_scenes(Truthful(), dataset, 'title', path)
    drawn = cv2.imread(str(path))
    assert drawn.shape == PICTURE

    # Panels are runs of columns that are not completely white, at half the height.
    middle = drawn[300:420]
    inside = (middle[55:65] != 255).any(axis=(0, 2))
    edges = np.flatnonzero(np.diff(np.pad(inside, 1).astype(int))).reshape(-1, 2)
    assert len(edges) == 6
    width = (edges[:, 1] - edges[:, 0]).min()
    panels = [middle[:, start + 2 : start + width - 2] for start, _ in edges]
    background, first = np.zeros(3, np.uint8), np.array(PALETTE[0][::-1], np.uint8)
    for image, truth, prediction in (panels[:3], panels[3:]):
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 500
        empty = (truth == background).all(axis=2)
        assert empty.any()
        assert (prediction[empty] == first).all(axis=1).mean() > 0.98
        other = ~empty & (truth != first).any(axis=2)
        assert (prediction[other] == truth[other]).all(axis=1).mean() > 0.9
    assert np.abs(panels[0].astype(int) - panels[3]).mean() > 5


@pytest.mark.parametrize(
    ('change', 'words'),
    [(['--max-iters=0'], 'max-iters'), (['--work-dir=file/below'], 'file')],
)
def test_wrong_arguments_are_one_line(demo, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    with pytest.raises(SystemExit) as stop:
        demo.main(change)
    assert str(stop.value.code).startswith('error: ')
    assert words in stop.value.code
