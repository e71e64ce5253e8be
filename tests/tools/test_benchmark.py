"""tools/benchmark.py: one real cell of each kind, the rest on made-up measurements."""

import importlib
import os

import pytest
import torch

from saga_mm.analysis import benchmark
from saga_mm.analysis.cells import run_cells
from saga_mm.analysis.cost import measure_cost

CELL = dict(
    dtype='fp32', size=64, round=0, device='cpu', batch_size=2, threads=1, keep_memory=False
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr('saga_mm.analysis.measure.SECONDS', 0)


@pytest.mark.parametrize('mode', ['infer', 'train'])
@pytest.mark.parametrize('model', ['saga_t', 'pvt_t_sdpa'])
def test_a_backbone(model, mode):
    cell = dict(CELL, model=model, mode=mode)
    result = benchmark.measure(cell)
    assert result['seconds'] > 0
    assert result['bytes'] >= 0
    assert result['parameters'] > 10e6
    flops = benchmark.measure(cell | dict(round='count'))['flops']
    backbone, call = benchmark.build(model)
    images = torch.randn(1, 3, 64, 64)
    cost = measure_cost(backbone, lambda: call(backbone, images))['']
    # In the backward pass each product becomes two, except in the first convolution, because images
    # get no gradient.
    factor = 3 if mode == 'train' else 1
    assert flops == pytest.approx(factor * cost.flops, rel=0.03 * (factor - 1))


@pytest.mark.parametrize('scope', ['det', 'seg'])
def test_a_config_file(scope, request):
    path = str(request.getfixturevalue(f'tiny_{scope}'))
    cell = dict(CELL, model=path, mode='train')
    assert benchmark.measure(cell)['seconds'] > 0
    assert benchmark.measure(cell | dict(round='count'))['flops'] > 0


@pytest.mark.parametrize('model', ['pvtv2_b1', 'mit_b1', 'swin_t', 'resnet50'])
def test_a_backbone_of_a_toolbox(model):
    assert benchmark.measure(dict(CELL, model=model, mode='infer'))['seconds'] > 0


def test_the_faster_attention_of_the_baseline_changes_no_number():
    torch.manual_seed(0)
    plain, call = benchmark.build('pvt_t')
    torch.manual_seed(0)
    fused, _ = benchmark.build('pvt_t_sdpa')
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for out, expected in zip(call(fused.eval(), x), call(plain.eval(), x), strict=True):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def made_up(cell):
    if cell['model'] == 'swin_t':
        return dict(error='out of memory')
    if cell['round'] == 'count':
        return dict(flops=2e9) if cell['model'] == 'saga_t' else dict(error='no memory to count')
    factor = {'saga_t': 1, 'pvt_t': 3}[cell['model']]
    return dict(seconds=factor * (1 + cell['round']), bytes=factor * 2**20, parameters=10**7)


def test_ratios_failed_cells_and_resuming(tool, monkeypatch, tmp_path, capsys):
    measured = []

    def run(worker, cell):
        measured.append(cell)
        return made_up(cell)

    monkeypatch.setattr('saga_mm.analysis.cells._Worker.run', run)
    options = ['--models', 'saga_t', 'pvt_t', 'swin_t', '--baseline', 'pvt_t']
    options += ['--sizes', '64', '128', '--rounds', '3', '--out', str(tmp_path)]
    tool('benchmark').main(options)
    assert [cell['model'] for cell in measured[:4]] == ['saga_t', 'pvt_t', 'swin_t', 'saga_t']
    assert len(measured) == 3 * 2 * (3 + 1)
    text = capsys.readouterr().out
    assert (tmp_path / 'benchmark.md').read_text() in text
    (row,) = (line for line in text.splitlines() if '| 64 | saga_t |' in line)
    # The median of 1, 2 and 3 s is 2 s; time and memory are a third of the baseline's.
    cells = [cell.strip() for cell in row.split('|')]
    assert cells[5:13] == ['10.0', '2.0', '0.5', '100%', '7812.5', '3.00', '1', '0.33']
    # FLOPs that could not be counted leave only a gap in the table.
    assert '| infer | fp32 | 64 | pvt_t | 10.0 |  | 0.167 |' in text
    assert '| infer | fp32 | 64 | swin_t | out of memory |' in text
    assert (tmp_path / 'benchmark.png').stat().st_size > 0

    # An interrupted run may leave half a line.
    with (tmp_path / 'results.jsonl').open('a') as file:
        file.write('{"cell": {"mode": "inf')
    measured.clear()
    tool('benchmark').main(options)
    assert {cell['model'] for cell in measured if cell['round'] != 'count'} == {'swin_t'}
    assert capsys.readouterr().out == text

    measured.clear()
    tool('benchmark').main([*options, '--no-flops'])
    assert 'count' not in {cell['round'] for cell in measured}
    assert '| infer | fp32 | 64 | saga_t | 10.0 |  | 0.5 |' in capsys.readouterr().out


MODULE = """
import os

def measure(cell):
    if cell['do'] == 'raise':
        raise ValueError('no such model')
    if cell['do'] == 'die':
        os.kill(os.getpid(), 9)
    print('noise')
    return dict(process=os.getpid())
"""


@pytest.mark.parametrize('new_process', [True, False])
def test_a_cell_that_fails_in_its_process(new_process, tmp_path, monkeypatch):
    (tmp_path / 'measure_cells.py').write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])
    monkeypatch.setenv('PYTHONPATH', path.rstrip(os.pathsep))
    cells = [dict(do=name) for name in ('work', 'work again', 'raise', 'die', 'work once more')]
    measure = importlib.import_module('measure_cells').measure
    results = run_cells(cells, measure, tmp_path / 'log.jsonl', new_process)
    assert [result.get('error') for result in results] == [
        None,
        None,
        'ValueError: no such model',
        'killed: out of memory',
        None,
    ]
    first, second, last = (result['process'] for result in results if 'process' in result)
    assert (first != second) is new_process
    assert last not in (first, second)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--models', 'saga_x'], "--models: 'saga_x' is none of"),
        (['--models', 'upernet+saga_x'], "--models: 'upernet+saga_x' is none of"),
        (['--models', 'pvt'], "no scope.Name; did you mean 'pvt_t'?"),
        (['--models', 'uper+saga_t'], "after a head of ('upernet', "),
        (['--models', 'nothing.py'], 'No such file or directory: nothing.py'),
        (['--models', 'saga_mm::a/b.py'], 'there is no config saga_mm::a/b.py'),
        (['--models', 'saga_t', '--mode', 'parts'], '--mode parts needs configs or HEAD+BACKBONE'),
        (['--baseline', 'pvt_x'], "--baseline must be one of ['saga_t', 'pvt_t', 'pvt_t_sdpa']"),
        (['--sizes', '8'], '--sizes must be at least 32 pixels, got 8'),
        (['--mode', 'graph', '--device', 'cpu'], '--mode graph needs a GPU, got --device cpu'),
        (['--rounds', '0'], '--rounds must be positive, got 0'),
        (['--device', 'abacus'], "device 'abacus' is not available"),
        (['--keep-memory', '--device', 'cuda'], '--keep-memory is for --device cpu, got cuda'),
    ],
)
def test_wrong_options(tool, options, message, tmp_path):
    with pytest.raises(SystemExit) as error:
        tool('benchmark').main([*options, '--out', str(tmp_path / 'out')])
    assert message in str(error.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('model', 'parts'),
    [
        ('segformer_head+mit_b1', ['backbone', 'head', 'post-processing']),
        ('semantic_fpn+swin_t', ['backbone', 'neck', 'head', 'post-processing']),
        ('upernet128+pvt_t_sdpa', ['backbone', 'head', 'post-processing']),
        ('retinanet+saga_t', ['backbone', 'neck', 'head', 'post-processing']),
        ('mask_rcnn+resnet50', ['backbone', 'neck', 'RPN', 'RoI heads and post-processing']),
    ],
)
def test_parts_of_whole_models(model, parts):
    cell = dict(CELL, model=model, mode='parts', batch_size=1)
    result = benchmark.measure(cell)
    assert [part['part'] for part in result['parts']] == parts
    assert all(part['seconds'] > 0 for part in result['parts'])


def test_the_table_of_parts(tool, monkeypatch, tmp_path, capsys):
    def run(worker, cell):
        if '+swin_t' in cell['model']:
            return dict(error='out of memory')
        times = dict(backbone=1 + cell['round'], head=6)
        return dict(
            parts=[dict(part=name, seconds=s, bytes=s * 2**20) for name, s in times.items()]
        )

    monkeypatch.setattr('saga_mm.analysis.cells._Worker.run', run)
    options = ['--models', 'upernet+saga_t', 'upernet+swin_t', '--mode', 'parts', '--sizes', '64']
    tool('benchmark').main([*options, '--out', str(tmp_path)])
    text = capsys.readouterr().out
    assert (tmp_path / 'benchmark.md').read_text() in text
    assert '| fp32 | 64 | upernet+saga_t | backbone | 2 | 25% | 2 |\n' in text
    assert '| fp32 | 64 | upernet+saga_t | head | 6 | 75% | 6 |\n' in text
    assert '| fp32 | 64 | upernet+saga_t | sum | 8 | 100% | 6 |\n' in text
    assert '| fp32 | 64 | upernet+swin_t | out of memory |' in text


def test_names_in_pictures():
    for name in benchmark.KNOWN:
        assert benchmark.title(name) == benchmark.TITLES[name]
        assert benchmark.is_ours(name) == name.startswith(('saga', 'sola', 'ravlt'))
    for head in benchmark.HEADS:
        assert benchmark.title(f'{head}+pvt_t_sdpa').endswith(' + PVT-T with SDPA')
    assert benchmark.title('mmdet.ResNet') == 'mmdet.ResNet'


def test_axes_are_logarithmic_and_results_of_zero_are_left_out(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(benchmark, 'write_figure', lambda path, figure, **_: figures.append(figure))
    row = dict(mode='infer', dtype='fp32', model='saga_t', bytes=0)
    rows = [dict(row, size=size, seconds=size / 1e3) for size in (64, 128)]
    benchmark.plot([*rows, dict(row, size=256, error='out of memory')], tmp_path / 'plot.png')
    (figure,) = figures
    speed, memory, times = figure.axes
    assert {axis.get_xscale() for axis in (speed, times)} == {'log'}
    assert {axis.get_yscale() for axis in (speed, times)} == {'log'}
    assert not memory.get_lines()
    (times,) = times.get_lines()
    assert times.get_label() == 'SAGA-T'
    assert list(times.get_ydata()) == pytest.approx([1e6 * 0.064 / 16**2, 1e6 * 0.128 / 32**2])
    figure.savefig(tmp_path / 'plot.png')
