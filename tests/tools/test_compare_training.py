"""tools/compare_training.py: learning rates, then seeds; a failure; and going on."""

import json

import pytest
from mmengine.config import Config

from saga_mm import apis
from saga_mm.analysis import cells
from saga_mm.analysis.trainings import best_rates, has_test_data, last_metrics, table
from saga_mm.checkpoint import latest_checkpoint


@pytest.fixture
def compare(tool):
    return tool('compare_training').main


@pytest.fixture
def configs(tiny_seg):
    """Two configs, of which the second one fails when it is built."""
    bad = tiny_seg.with_name('bad.py')
    bad.write_text(f"_base_ = './{tiny_seg.name}'\nmodel = dict(backbone=dict(arch='huge'))\n")
    return str(tiny_seg), str(bad)


def test_rates_are_chosen_with_one_seed_and_nothing_is_repeated(
    compare, configs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / 'out'
    command = [*configs, '--lr', '1e-3', '1e-4', '--seeds', '3', '4', '--out-dir', str(out)]
    options = ['--cfg-options', 'train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    with pytest.raises(
        SystemExit, match='2 of 5 trainings failed: bad: ValueError: arch must be one of'
    ):
        compare([*command, '--jobs', '2', *options])
    lines = (out / 'trainings.jsonl').read_text().split('\n')
    entries = [json.loads(line) for line in lines if line]
    entries = [entry for entry in entries if 'error' not in entry['result']]
    # Two learning rates with the first seed, then the better one with the second.
    entries.sort(key=lambda entry: (entry['cell']['seed'], -entry['cell']['learning_rate']))
    done = [entry['cell'] for entry in entries]
    assert [(cell['seed'], cell['learning_rate']) for cell in done[:2]] == [(3, 1e-3), (3, 1e-4)]
    values = [entry['result']['value'] for entry in entries]
    best = 1e-3 if values[0] >= values[1] else 1e-4
    assert [(cell['seed'], cell['learning_rate']) for cell in done[2:]] == [(4, best)]
    assert last_metrics(done[0]['folder'])['mIoU'] == values[0]

    (good, bad) = (out / 'trainings.md').read_text().splitlines()[2:]
    assert f'| mIoU | {(values[2] + (values[0] if best == 1e-3 else values[1])) / 2:.2f} |' in good
    assert 'arch must be one of' in bad

    started = []
    monkeypatch.setattr(
        cells._Worker, 'run', lambda worker, cell: started.append(cell) or {'error': ''}
    )
    with pytest.raises(SystemExit, match='2 of 5 trainings failed'):
        compare([*command, *options])
    assert {cell['name'] for cell in started} == {'bad'}
    # Another schedule is another training, in another folder.
    with pytest.raises(SystemExit, match='4 of 4 trainings failed'):
        compare([*command, '--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=1'])
    folders = {cell['folder'] for cell in started if cell['name'] != 'bad'}
    assert folders and not folders & {cell['folder'] for cell in done}


@pytest.mark.parametrize('interval', [1, 2])
def test_a_stop_in_the_last_validation(compare, tiny_seg, tmp_path, interval):
    out, log = tmp_path / 'out', tmp_path / 'out/trainings.jsonl'
    short = ['train_cfg.max_iters=2', f'train_cfg.val_interval={interval}']
    command = [str(tiny_seg), '--seeds', '0', '--out-dir', str(out), '--cfg-options', *short]
    compare(command)
    (line,) = filter(None, log.read_text().split('\n'))
    entry = json.loads(line)
    # The last checkpoint is written before the last validation.
    (scalars,) = (out / tiny_seg.stem).glob('*/*/vis_data/scalars.json')
    entries = scalars.read_text().splitlines()
    assert 'mIoU' in entries[-1]
    scalars.write_text('\n'.join(entries[:-1]) + '\n')
    log.unlink()
    compare(command)
    (line,) = filter(None, log.read_text().split('\n'))
    assert json.loads(line)['result']['metric'] == 'mIoU'
    assert json.loads(line)['result']['value'] == pytest.approx(entry['result']['value'])


def test_a_test_that_only_writes_files(compare, tiny_seg, tmp_path):
    config = tiny_seg.with_name('files.py')
    config.write_text(
        f"_base_ = './{tiny_seg.name}'\n"
        f'test_evaluator = dict(format_only=True, output_dir={str(tmp_path / "files")!r})\n'
    )
    out = tmp_path / 'out'
    short = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    compare([str(config), '--seeds', '0', '--out-dir', str(out), '--cfg-options', *short])
    (line,) = filter(None, (out / 'trainings.jsonl').read_text().split('\n'))
    assert json.loads(line)['result'].keys() == {'metric', 'value'}


def test_a_config_without_validation(compare, tiny_seg):
    config = tiny_seg.with_name('blind.py')
    config.write_text(
        f"_base_ = './{tiny_seg.name}'\nval_dataloader = val_evaluator = val_cfg = None\n"
    )
    with pytest.raises(SystemExit, match="must have an entry 'val_dataloader', got None"):
        compare([str(config)])


def test_the_lowest_value():
    results = [dict(name='a', learning_rate=rate, metric='rmse', value=rate) for rate in (2.0, 1.0)]
    assert best_rates(results) == {'a': 2.0}
    assert best_rates(results, lowest=True) == {'a': 1.0}
    assert ' 1.000 to 1.000 | 1 | 1 | 2: 2.000 |' in list(table(results, lowest=True))[2]


def test_table():
    results = [
        dict(name='a', learning_rate=1.0, metric='mIoU', value=10.0),
        dict(name='a', learning_rate=2.0, metric='mIoU', value=20.0),
        dict(name='b', learning_rate=1.0, error='out of memory'),
        dict(name='a', learning_rate=2.0, metric='mIoU', value=24.0),
        dict(name='c', learning_rate=1.0, metric='coco/segm_mAP', value=0.408),
    ]
    assert best_rates(results) == {'a': 2.0, 'c': 1.0}
    assert list(table(results))[2:] == [
        '| a | mIoU | 22.00 | 20.00 to 24.00 | 2 | 2 | 1: 10.00 |  |',
        '| b | - | - | - | 0 | - | - | out of memory |',
        '| c | coco/segm_mAP | 0.4080 | 0.4080 to 0.4080 | 1 | 1 |  |  |',
    ]


def test_data_that_nothing_is_chosen_by(compare, tiny_seg, tmp_path):
    config = tiny_seg.with_name('split.py')
    config.write_text(
        f"_base_ = './{tiny_seg.name}'\n"
        'val_dataloader = dict(dataset=dict(indices=[0]))\n'
        'test_dataloader = dict(dataset=dict(indices=[1]))\n'
    )
    out = tmp_path / 'out'
    short = ['train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    compare([str(config), '--seeds', '0', '--out-dir', str(out), '--cfg-options', *short])
    (line,) = filter(None, (out / 'trainings.jsonl').read_text().split('\n'))
    entry = json.loads(line)
    cell, result = entry['cell'], entry['result']
    assert result['value'] == last_metrics(cell['folder'])['mIoU']
    options = {'test_dataloader.dataset.indices': [1]}
    checkpoint = latest_checkpoint(cell['folder'])
    metrics = apis.test(str(tiny_seg), checkpoint, work_dir=tmp_path / 'test', options=options)
    assert result['test'] == pytest.approx(metrics['mIoU'])
    line = (out / 'trainings.md').read_text().splitlines()[2]
    assert f'| {result["test"]:.2f} | {result["test"]:.2f} to {result["test"]:.2f} |' in line


def test_how_data_are_loaded_makes_no_other_data():
    data = dict(type='ADE20KDataset')
    val, test = dict(dataset=data, num_workers=0), dict(dataset=data, num_workers=2)
    evaluators = dict(val_evaluator={}, test_evaluator={})
    cfg = Config(dict(val_dataloader=val, test_dataloader=test, **evaluators))
    assert not has_test_data(cfg)
    cfg.test_dataloader.dataset.indices = [1]
    assert has_test_data(cfg)
    cfg.test_dataloader = None
    assert not has_test_data(cfg)


def test_table_with_a_test():
    results = [
        dict(name='a', learning_rate=1.0, metric='mIoU', value=10.0, test=9.0),
        dict(name='a', learning_rate=1.0, metric='mIoU', value=12.0, test=12.0),
        dict(name='b', learning_rate=1.0, metric='mIoU', value=1.0),
        dict(name='c', learning_rate=1.0, error='out of memory'),
    ]
    head, rule, *lines = table(results)
    assert {line.count('|') for line in (head, rule, *lines)} == {11}
    assert lines[0].startswith('| a | mIoU | 11.00 | 10.00 to 12.00 | 10.50 | 9.000 to 12.00 | 2 |')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--seeds', '1', '1'], '--seeds must be different'),
        (['--lr', '-1'], '--lr must be different and not negative'),
        (['--jobs', '0'], '--jobs must be positive, got 0'),
    ],
)
def test_wrong_options(compare, configs, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        compare([configs[0], *arguments])
    assert message in exit_.value.code
