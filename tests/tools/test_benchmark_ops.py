"""The op benchmark runs where there is no GPU, and its table holds what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'benchmark_ops.py'


@pytest.mark.parametrize(
    'op',
    [
        'gated',
        'rank_augmented',
        'decay',
        'wkv',
        'depthwise',
        'layer_norm',
        'ffn',
        'gated_attention',
    ],
)
def test_a_small_case_on_a_cpu(op, tmp_path):
    options = [
        '--op',
        op,
        '--device',
        'cpu',
        '--tokens',
        '64',
        '4096',
        '--shapes',
        '1,2,16',
        '1,8,64',
        '--seconds',
        '0',
    ]
    command = [sys.executable, str(TOOL), *options, '--out-dir', str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    report = json.loads((tmp_path / 'ops.json').read_text())
    assert report['environment']['op'] == op
    assert report['environment']['dtype'] == 'float32'
    assert report['copy_gb_per_s'] > 0
    assert len(report['rows']) == 4
    # Those that are no attention alone are not compared with softmax attention.
    forward_only = 'ffn', 'gated_attention'
    compared = op not in ('depthwise', 'layer_norm', *forward_only)
    for row in report['rows']:
        assert list(row['cells']) == ['eager', 'this'] + ['SDPA'] * compared
        assert row['cells']['this']['forward'] > 0
        assert row['share']['forward']['gb_per_s'] > 0
        assert (
            ('both' in row['cells']['this'])
            == ('backward' in row['share'])
            == (op not in forward_only)
        )
    table = (tmp_path / 'ops.md').read_text()
    assert '| 1, 8, 64 | 4096 |' in table
    if compared:
        assert report['rows'][-1]['cells']['SDPA'] == dict(error='too long')
    assert ('too long' in table) == compared


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--shapes', '1,32'], "argument --shapes: expected B,H,D, such as 1,8,64, got '1,32'"),
        (['--shapes', '0,1,32'], "expected B,H,D, such as 1,8,64, got '0,1,32'"),
        (['--tokens', '64', '0'], 'error: --tokens must be positive, got 0'),
    ],
)
def test_wrong_options(tool, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        tool('benchmark_ops').main([*options, '--out-dir', str(tmp_path / 'out')])
    assert message in f'{error.value.code}{capsys.readouterr().err}'
    assert not (tmp_path / 'out').exists()
