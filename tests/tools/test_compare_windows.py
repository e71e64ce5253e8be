"""tools/compare_windows.py on images of 32x32 pixels."""

import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from saga_mm.apis import build_model
from saga_mm.apis import test as run_test


@pytest.fixture
def compare(tool):
    return tool('compare_windows')


@pytest.fixture
def arguments(tiny_seg, tmp_path):
    """A config and its random weights, and where the results go."""
    torch.manual_seed(0)
    model = build_model(Config.fromfile(tiny_seg))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'weights.pth')
    out = tmp_path / 'out'
    return [str(tiny_seg), str(tmp_path / 'weights.pth'), f'--out-dir={out}', '--device=cpu']


def row(text, name):
    """The cells of a row of a table, as numbers."""
    (line,) = re.findall(rf'^\| {re.escape(name)} \|(.*)$', text, re.MULTILINE)
    cells = [cell.split()[0] for cell in line.split('|')[:-1]]
    return [None if cell == '-' else float(cell) for cell in cells]


def test_all_is_measured_with_labels(compare, arguments, tmp_path, capsys):
    compare.main([*arguments, '--windows', '16/16', '24'])
    text = (tmp_path / 'out' / 'windows.md').read_text()
    assert text in capsys.readouterr().out + '\n'
    assert '| whole | windows 16/16 | windows 24/16 |' in text
    metrics = run_test(arguments[0], arguments[1], work_dir=tmp_path / 'test', quiet=True)
    whole, *others = row(text, 'mean IoU')
    assert whole == pytest.approx(metrics['mIoU'], abs=0.02)
    assert others != [whole, whole]
    for name in ('IoU, a', 'IoU, b', 'seconds per image', 'peak memory'):
        assert len(row(text, name)) == 3
    shares = row(text, 'changes up to 16 pixels from borders')
    assert max(shares) > 0
    # the labels have edges where objects end, which is not at the borders
    assert len(row(text, 'edges at the same places, labels')) == 2
    with Image.open(tmp_path / 'out' / 'windows.png') as picture:
        assert len(picture.convert('RGB').getcolors(2**20)) > 3


def test_images_without_labels_and_at_full_size(compare, arguments, tiny_data, tmp_path, capsys):
    rng = np.random.default_rng(0)
    path = tmp_path / 'photo.png'
    Image.fromarray(rng.integers(0, 255, (40, 70, 3), np.uint8)).save(path)
    cfg = Config.fromfile(arguments[0])
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='Resize', scale=(32, 32)))
    cfg.dump(arguments[0])
    arguments += ['--images', str(path), '--windows', '32', '64']
    with pytest.raises(SystemExit, match=r'photo.png: .* 70x40 pixels into 32x32.*--full-size'):
        compare.main(arguments)
    assert not list((tmp_path / 'out').glob('*'))
    compare.main([*arguments, '--full-size'])
    printed = capsys.readouterr().out
    assert 'IoU' not in printed
    # one window of 64 pixels has a border in the width only
    assert None not in row(printed, 'edges at borders, windows')
    assert row(printed, 'edges at the same places, labels') == [None, None]


def test_windows_of_the_size_of_the_image_have_no_seams(compare, arguments, tmp_path, capsys):
    compare.main([*arguments, '--windows', '32', '--limit=1'])
    assert row(capsys.readouterr().out, 'changes elsewhere') == [None]
    assert not (tmp_path / 'out' / 'windows.png').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--windows', '32', '32/21'], '--windows must be different, got 32/21 32/21'),
        (['--windows', '32', '--limit=0'], '--limit must be at least 1, got 0'),
        (['--windows', '32', '--max-memory=10kB'], 'max_memory must be at least'),
        (['--windows', '32', '--images', 'none.png'], 'no such image: none.png'),
    ],
)
def test_bad_options(compare, arguments, options, message):
    with pytest.raises(SystemExit, match=message):
        compare.main([*arguments, *options])


@pytest.mark.parametrize('text', ['0', '16/0', '16/17', '-4', 'wide', '16/8/4'])
def test_bad_windows(compare, arguments, text, capsys):
    with pytest.raises(SystemExit):
        compare.main([*arguments, f'--windows={text}'])
    assert 'expected SIZE or SIZE/STRIDE' in capsys.readouterr().err
