"""Tests of the command line of the generator."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools/make_scenes.py'
SMALL = ('--train', '3', '--val', '2', '--size', '48', '64')


@pytest.fixture(scope='module')
def main():
    spec = importlib.util.spec_from_file_location('make_scenes_tool', TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main


@pytest.mark.parametrize(
    ('layout', 'root', 'file'),
    [
        ('scenes', 'data/scenes', 'images/val/00002.jpg'),
        ('coco', 'data/coco', 'val2017/000000000002.jpg'),
        (
            'ade20k',
            'data/ade/ADEChallengeData2016',
            'annotations/validation/ADE_val_00000002.png',
        ),
    ],
)
def test_makes_a_layout_where_configs_look_for_it(
    main, tmp_path, monkeypatch, capsys, layout, root, file
):
    if layout == 'coco':
        pytest.importorskip('mmdet')
    monkeypatch.chdir(tmp_path)
    main(['--layout', layout, root, *SMALL])
    assert (tmp_path / root / file).is_file()
    assert 'configs find it there' in capsys.readouterr().out


def test_says_how_to_use_another_folder(main, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(['my scenes', *SMALL])
    printed = capsys.readouterr().out
    out = tmp_path / 'my scenes'
    assert f"'train_dataloader.dataset.data_root={out}'" in printed
    assert f"'val_evaluator.ann_file={out}/instances_val.json'" in printed


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('out', '--layout', 'voc'), "layout: expected one of scenes, coco, ade20k, got 'voc'"),
        (('out', '--train', '-3'), 'train: expected an integer from 1 to 999999, got -3'),
        (('out', '--size', '8', '8'), 'height: expected an integer from 32 to 4096, got 8'),
        (('file/out',), 'file/'),
        (('file',), 'not made by this generator'),
    ],
)
def test_errors_are_one_line(main, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert message in caught.value.code and '\n' not in caught.value.code
    assert not (tmp_path / 'out').exists()


def test_as_a_program(tmp_path):
    paths = [str(ROOT), str(ROOT / 'kernels'), os.environ.get('PYTHONPATH', '')]
    result = subprocess.run(
        [sys.executable, str(TOOL), 'out', *SMALL],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(paths)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f'scenes: {tmp_path / "out"}' in result.stdout
    assert 'train scenes' in result.stderr and '100%' in result.stderr
