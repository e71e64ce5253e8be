"""tools/sweep_patterns.py: the smallest sweep there is, with a cell that fails, and its resume."""

import json
import signal
import sys

import cv2
import pytest
import torch

from saga_mm.backbones.sola_vision import PRESETS

BACKBONE = """
_base_ = './{base}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)),
        out_indices=(0, 1),
        impl='triton',
    )
)
"""
# linear layers can't run without a GPU, where Triton is asked for: only the second has none
PATTERNS = ('S/L/S/S', 'softmax')

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='Triton would run, and no cell would fail'
)


@pytest.fixture
def sweep(tool, monkeypatch):
    monkeypatch.setitem(sys.modules, 'infer', tool('infer'))
    return tool('sweep_patterns')


@pytest.fixture
def config(tiny_seg):
    path = tiny_seg.with_name('sola.py')
    path.write_text(BACKBONE.format(base=tiny_seg.name))
    return path


def failure(main, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    message = exit_.value.code
    assert message.startswith('error: ')
    assert '\n' not in message
    return message.removeprefix('error: ')


def rows(folder):
    lines = (folder / 'patterns.md').read_text().splitlines()
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[2:]]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_a_cell_that_fails_keeps_the_rest_and_is_tried_again(sweep, config, tmp_path, monkeypatch):
    out = tmp_path / 'sweep'
    options = ['--out-dir', str(out), '--device', 'cpu', '--repeats', '2', '--train', '1']
    arguments = [str(config), '--patterns', *PATTERNS, *options]
    sweep.main(arguments)
    bad, good = rows(out)
    assert [bad['pattern'], good['pattern']] == list(PATTERNS)
    assert "impl='triton' can't run: it needs a GPU" in bad['failed']
    assert 'training: ' in bad['failed']
    # what needs no forward pass is told all the same
    assert bad['parameters'].endswith('M')
    assert bad['ms'] == bad['peak MiB'] == bad['mIoU after 1 iterations'] == '-'
    assert good['layers'] == 'S S S S'
    assert good['failed'] == ''
    assert float(good['ms']) > 0
    assert float(good['peak MiB']) > 50
    assert 0 <= float(good['mIoU after 1 iterations']) <= 100
    assert cv2.imread(str(out / 'patterns.png')).shape[2] == 3
    records = (out / 'cells.jsonl').read_text()
    parts = [json.loads(line)['settings']['part'] for line in records.splitlines()]
    assert parts == ['cost', 'accuracy']

    # The second run starts nothing for what is finished, and a damaged line costs only itself.
    (out / 'cells.jsonl').write_text(records + '{"settings": ')
    started = []

    class Worker(sweep.Worker):
        def __init__(self, cell, args):
            started.append(cell.pattern)

        def answer(self):
            raise sweep.CellError('a | b')

        def close(self):
            pass

    def train(command, **options):
        started.append(command)
        raise AssertionError('a finished cell is trained again')

    monkeypatch.setattr(sweep, 'Worker', Worker)
    monkeypatch.setattr(sweep.subprocess, 'run', train)
    sweep.main([str(config), '--patterns', 'softmax', *options])
    assert rows(out) == [good]
    assert started == []
    sweep.main([str(config), '--patterns', 'linear', 'softmax', *options[:-2]])
    failed, same = rows(out)
    assert started == ['linear']
    assert failed['failed'] == 'a / b'
    assert same['ms'] == good['ms']
    # other settings are other cells
    sweep.main([str(config), '--patterns', 'softmax', *options[:-2], '--batch', '2'])
    assert started == ['linear', 'softmax']


@pytest.mark.filterwarnings('ignore:layers=')
def test_counts(sweep):
    cell = dict(
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)),
        out_indices=(0,),
        lepe_kernel_size=0,
        cpe_kernel_size=0,
    )
    tokens, dim = 8 * 8, 8
    found = [
        sweep.count({**cell, 'layers': [letter, 'L', 'L', 'L']}, torch.randn(1, 3, 32, 32))
        for letter in ('L', 'LL', 'S', 'SS')
    ]
    linear, softmax = (b['multiply_adds'] - a['multiply_adds'] for a, b in (found[:2], found[2:]))
    # projections and FFN (of ratio 4); then S, o and the denominator, or the scores and the output
    assert linear == tokens * (5 + 1 + 8) * dim**2 + 2 * tokens * dim * (dim + 0.5)
    assert softmax == tokens * (3 + 1 + 8) * dim**2 + 2 * tokens**2 * dim
    parameters = [b['parameters'] - a['parameters'] for a, b in (found[:2], found[2:])]
    assert parameters[0] - parameters[1] == 2 * dim * (dim + 1)


@pytest.mark.parametrize(
    ('status', 'log', 'expected'),
    [
        (1, 'Traceback\n  x\nRuntimeError: wrong | shape\n\n', 'RuntimeError: wrong | shape'),
        (1, 'error: no data', 'no data'),
        (1, '', 'exit status 1'),
        (1, 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate', 'out of memory'),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you", 'out of memory'),
        (-signal.SIGKILL, 'loading', 'killed by SIGKILL, perhaps out of memory'),
        (-signal.SIGSEGV, '', 'killed by SIGSEGV'),
    ],
)
def test_reasons_are_one_line(sweep, status, log, expected):
    assert sweep.reason(status, log) == expected


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--patterns', 'L/L/L'], 'layers must be 4 strings of L and S'),
        (['--patterns', 'every_4th'], 'layers must be 4 strings of L and S'),
        (['--patterns', 'L/L/LX/S'], "got ['L', 'L', 'LX', 'S']"),
        (['--repeats', '0'], 'repeats must be at least 1, got 0'),
        (['--train', '0'], 'train must be at least 1, got 0'),
        (['--size', '0', '32'], 'size must be positive, got [0, 32]'),
        (['--device', 'abacus'], "device 'abacus' is not available"),
        (['--cfg-options', 'model.backbone.type=saga_mm.SAGA'], 'must be saga_mm.SoLAVision, got'),
        (['--train', '1', '--cfg-options', 'train_cfg.type=EpochBasedTrainLoop'], 'by iterations'),
        (
            ['--train', '1', '--cfg-options', 'train_dataloader.dataset.data_root=nowhere'],
            'the folder nowhere is missing',
        ),
    ],
)
def test_mistakes_are_one_line(sweep, config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure(sweep.main, config, *arguments)
    assert not (tmp_path / 'work_dirs').exists()


def test_missing_config(sweep, tmp_path):
    assert 'missing.py' in failure(sweep.main, tmp_path / 'missing.py')


def test_presets_are_the_default(sweep):
    assert sweep.parse_args(['a.py']).patterns == list(PRESETS)
