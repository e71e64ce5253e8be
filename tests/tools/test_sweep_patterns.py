"""tools/sweep_patterns.py: a small sweep with a cell that fails, and its resume."""

import cv2
import pytest
import torch
from mmengine.config import Config

from saga_mm.analysis import cells
from saga_mm.analysis.patterns import count, fill, make_cells, make_rows, table
from saga_mm.backbones.sola_vision import PRESETS, TABLE_2

BACKBONE = """
_base_ = './{base}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)),
        out_indices=(0, 1),
        impl='triton',
        linear='gated',
    )
)
"""
# With impl='triton', linear layers fail without a GPU; only the second pattern has none.
PATTERNS = ('S/L/S/S', 'softmax')

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='Triton would run, and no cell would fail'
)


@pytest.fixture
def sweep(tool):
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
    head, _, *body = ([text.strip() for text in line.split('|')[1:-1]] for line in lines[2:])
    return [dict(zip(head, row, strict=True)) for row in body]


def test_a_cell_that_fails_keeps_the_rest_and_is_tried_again(sweep, config, tmp_path, monkeypatch):
    out = tmp_path / 'sweep'
    options = ['--out-dir', str(out), '--device', 'cpu', '--rounds', '1']
    sweep.main([str(config), '--patterns', *PATTERNS, *options, '--train', '1'])
    bad, good = rows(out)
    assert [bad['pattern'], good['pattern']] == list(PATTERNS)
    assert "impl='triton' can't run: it needs a GPU" in bad['failed']
    # Columns that need no forward pass are filled in any case.
    assert bad['parameters'].endswith('M')
    assert bad['ms'] == bad['peak MiB'] == bad['mIoU'] == '-'
    assert good['layers'] == 'S S S S'
    assert good['failed'] == ''
    assert float(good['ms']) > 0
    assert float(good['peak MiB']) >= 0
    assert 0 <= float(good['mIoU']) <= 100
    assert cv2.imread(str(out / 'patterns.png')).shape[2] == 3

    # The second run does not repeat finished cells, and half a line loses only its own cell.
    with (out / 'cells.jsonl').open('a') as file:
        file.write('{"cell": ')
    started = []

    def fail(worker, cell):
        started.append((cell['part'], cell['name']))
        return dict(error='error: a | b')

    monkeypatch.setattr(cells._Worker, 'run', fail)
    sweep.main([str(config), '--patterns', *PATTERNS, *options, '--train', '1'])
    assert started == [('time', 'gated_S-L-S-S'), ('train', 'gated_S-L-S-S')]
    failed, same = rows(out)
    assert failed['failed'] == 'a / b'
    assert same == good
    # Other settings make other cells.
    started.clear()
    arguments = [config, '--patterns', 'softmax', *options, '--batch-size', '2']
    message = failure(sweep.main, *arguments)
    assert message == 'all of 2 measurements failed: gated_softmax: a / b'
    assert started == [('count', 'gated_softmax'), ('time', 'gated_softmax')]


@pytest.mark.parametrize(
    ('option', 'channels'), [('pad_mask=True', 4), ('in_channels=1', 1), ('in_channels=5', 5)]
)
def test_the_input_has_the_channels_of_the_backbone(sweep, config, tmp_path, option, channels):
    options = ['--out-dir', str(tmp_path / 'sweep'), '--device', 'cpu', '--rounds', '1']
    options += ['--cfg-options', f'model.backbone.{option}']
    sweep.main([str(config), '--patterns', 'softmax', *options])
    (row,) = rows(tmp_path / 'sweep')
    assert row['failed'] == ''
    assert float(row['ms']) > 0
    assert f'1 x {channels} x 32 x 32' in (tmp_path / 'sweep/patterns.md').read_text()


@pytest.mark.filterwarnings('ignore:pattern=')
def test_counts():
    backbone = dict(
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)),
        out_indices=(0,),
        lepe_kernel_size=0,
        cpe_kernel_size=0,
        linear='gated',
    )
    tokens, dim = 8 * 8, 8
    found = [
        count(
            dict(backbone={**backbone, 'pattern': [p, 'L', 'L', 'L']}, batch_size=1, size=[32, 32])
        )
        for p in ('L', 'LL', 'S', 'SS')
    ]
    linear, softmax = (b['flops'] - a['flops'] for a, b in (found[:2], found[2:]))
    # Projections and FFN (K and V of ratio 4, R), then S, o and the denominator, or scores and
    # output.
    assert linear == 2 * (tokens * (5 + 1 + 9) * dim**2 + 2 * tokens * dim * (dim + 0.5))
    assert softmax == 2 * (tokens * (3 + 1 + 9) * dim**2 + 2 * tokens**2 * dim)
    parameters = [b['parameters'] - a['parameters'] for a, b in (found[:2], found[2:])]
    assert parameters[0] - parameters[1] == 2 * dim * (dim + 1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--patterns', 'L/L/L'], 'pattern must be 4 strings of L and S'),
        (['--patterns', 'every_4th'], 'pattern must be 4 strings of L and S'),
        (['--patterns', 'L/L/LX/S'], "got 'L/L/LX/S'"),
        (['--rounds', '0'], '--rounds must be at least 1, got 0'),
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


def test_missing_config(sweep, tmp_path, capsys):
    assert 'missing.py' in failure(sweep.main, tmp_path / 'missing.py')
    with pytest.raises(SystemExit):
        sweep.main([])
    assert 'required: config' in capsys.readouterr().err


def test_table_2_and_seeds(config, tmp_path):
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(layers='linear', arch='tiny')
    rows = make_rows(cfg, ['table2', 'LLSLLS', 'linear'], ['wkv'])
    assert [row['pattern'] for row in rows] == [*TABLE_2, 'linear']
    assert all(
        row['layers'] == ('LL', 'LL', p, 'LL') for row, p in zip(rows, TABLE_2, strict=False)
    )
    assert all('layers' not in row['backbone'] for row in rows)
    cells = make_cells(rows[:2], cfg, tmp_path, 1, 5, (3, 4), 'cpu')
    cells = [cell for cell in cells if cell['part'] == 'train']
    assert [cell['name'] for cell in cells] == ['wkv_LLLLLL', 'wkv_SLLLLL'] * 2
    written = [Config.fromfile(f'{cell["folder"]}/config.py') for cell in cells]
    assert [one.randomness.seed for one in written] == [3, 3, 4, 4]
    assert len({cell['config'] for cell in cells}) == 4


def test_the_median_and_the_range_over_seeds():
    rows = [dict(pattern='LLSLLS', linear='wkv', layers=('L',) * 4)]
    fill(rows, [dict(name='wkv_LLSLLS', mIoU=value) for value in (20.5, 21.25, 19.0)])
    assert '20.50 (19.00 to 21.25)' in [*table(rows)][-1]


def test_presets_are_the_default(sweep):
    assert sweep.parse_args(['a.py']).patterns == list(PRESETS)
