"""tools/benchmark_runtimes.py: each runtime computes what PyTorch does, to its precision."""

import importlib.util

import pytest
import torch

from saga_mm.analysis import runtimes

# Largest error that each precision may have on a network of random weights.
BOUNDS = dict(fp32=1e-4, bf16=0.1, int8=0.3)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr('saga_mm.analysis.measure.SECONDS', 0)
    # It would hold for the tests that follow.
    monkeypatch.setattr(runtimes, 'keep_freed_memory', lambda: True)


def test_each_runtime_and_precision(tiny_seg, tmp_path):
    config = str(tiny_seg)
    module, outputs = runtimes.select(runtimes.load(config, None), 'backbone')
    names = ('pytorch', 'onnxruntime', 'openvino')
    runtimes.prepare(module, outputs, torch.randn(1, 3, 64, 64), names, tmp_path)
    common = dict(
        config=config,
        checkpoint=None,
        part='backbone',
        threads=1,
        folder=str(tmp_path),
        test=False,
    )
    results = []
    for runtime in names:
        for precision in runtimes.RUNTIMES[runtime]:
            cell = dict(common, runtime=runtime, precision=precision)
            result = runtimes.measure(cell)
            assert result['seconds'] > 0
            assert result['bytes'] >= 0
            assert result['error'] <= BOUNDS[precision], cell
            results.append({**cell, **result})
    # They are what they are called: lower precision gives another result.
    errors = {(one['runtime'], one['precision']): one['error'] for one in results}
    assert errors['pytorch', 'fp32'] == 0
    assert errors['pytorch', 'bf16'] > 1e-4
    assert errors['onnxruntime', 'int8'] > 1e-4
    lines = runtimes.table([*results, dict(common, runtime='aoti', precision='fp32', error='no')])
    assert len(lines.splitlines()) == 2 + len(results) + 1
    assert lines.endswith('| aoti | fp32 | no | | |')


def test_the_tool(tool, tiny_seg, tmp_path, capsys):
    torch.manual_seed(0)
    arguments = ['--size', '64', '64', '--out-dir', str(tmp_path / 'out'), '--part', 'model']
    tool('benchmark_runtimes').main([str(tiny_seg), *arguments, '--runtimes', 'pytorch'])
    text = (tmp_path / 'out/runtimes.md').read_text()
    assert text in capsys.readouterr().out
    rows = [line.split(' | ') for line in text.splitlines()[4:]]
    assert [row[0] + row[1] for row in rows] == ['| pytorchfp32', '| pytorchbf16']
    assert rows[0][-1] == '0.0e+00 |'


@pytest.mark.parametrize('part', ['backbone', 'model'])
def test_accuracy_in_each_runtime(part, tool, tiny_seg, tmp_path):
    weights = tmp_path / 'weights.pth'
    model = runtimes.load(str(tiny_seg), None)
    torch.save(model.state_dict(), weights)
    expected = tool('test').main([str(tiny_seg), str(weights), '--work-dir', str(tmp_path)])['mIoU']
    arguments = ['--size', '32', '32', '--out-dir', str(tmp_path / 'out'), '--part', part]
    arguments += ['--checkpoint', str(weights), '--runtimes', 'pytorch', 'onnxruntime', '--test']
    tool('benchmark_runtimes').main([str(tiny_seg), *arguments])
    head, _, *rows = (tmp_path / 'out/runtimes.md').read_text().splitlines()[2:]
    assert head.endswith('| error | mIoU |')
    found = {tuple(row.split(' | ')[:2]): float(row.split(' | ')[-1].strip(' |')) for row in rows}
    assert found['| pytorch', 'fp32'] == pytest.approx(expected, abs=0.01)
    assert found['| onnxruntime', 'fp32'] == pytest.approx(expected, abs=0.5)
    assert 0 < found['| onnxruntime', 'int8'] <= 100


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['--size', '0', '4'], 'error: --size must be two positive numbers, got (0, 4)'),
        (['--runtimes', 'openvino'], 'error: --runtimes openvino needs openvino: pip install'),
        (
            ['--runtimes', 'onnxruntime'],
            'error: the format onnx needs no_such_package: pip install',
        ),
    ],
)
def test_mistakes_are_one_line(tool, tiny_seg, tmp_path, monkeypatch, options, expected):
    program = tool('benchmark_runtimes')
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        program.importlib.util,
        'find_spec',
        lambda name, *args: None if name == 'openvino' else find_spec(name, *args),
    )
    monkeypatch.setattr('saga_mm.apis.export.ONNX', ('torch', 'no_such_package'))
    with pytest.raises(SystemExit) as stop:
        program.main([str(tiny_seg), *options, '--out-dir', str(tmp_path)])
    assert stop.value.code.startswith(expected)
