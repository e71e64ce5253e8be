"""Each tool names all files that it wrote, or the folders that it filled."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from saga_mm.analysis import cells
from saga_mm.apis import build_model

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SOLA = """
_base_ = './{base}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)),
        out_indices=(0, 1),
        linear='decay',
    )
)
"""
# The tool and its arguments. All files are written to `out`.
RUNS = {
    'rank': 'analyze_attention rank --models a={config} --images {image} --out-dir out',
    'field': 'analyze_attention field --models a={sola} --images {image} --out-dir out',
    'depth': 'analyze_attention field --depth 2 --tokens 8 --inputs 1 --out-dir out',
    'map': 'analyze_attention map --models a={config} --images {image} --pixel 3 5 --out-dir out',
    'speed': 'benchmark --models saga_t pvt_t --sizes 32 --rounds 1 --out out',
    'ops': 'benchmark_ops --tokens 64 --shapes 1,1,8 --seconds 0 --device cpu --out-dir out',
    'runtimes': 'benchmark_runtimes {config} --size 32 32 --runtimes pytorch --out-dir out',
    'trainings': 'compare_training {config} --lr 1e-3 1e-4 --out-dir out',
    'windows': 'compare_windows {config} {weights} --windows 16/16 --device cpu --out-dir out',
    'convert': 'convert_checkpoint {config} {weights} out/converted.pth',
    'export': 'export {config} --checkpoint {weights} --size 64 64 --out out/model.onnx',
    'flops': 'get_flops {config} --size 32 32 --json out/flops.json',
    'drawings': 'infer {image} --config {config} --checkpoint {weights} --out-dir out '
    '--predictions-dir out/data',
    'whole': 'infer {image} --config {config} --checkpoint {weights} --max-memory 1G --out-dir out',
    'scenes': 'make_scenes out/scenes --train 2 --val 1 --size 64 64',
    'new': 'new --task segmentation --data {data} --out out/own.py',
    'patterns': 'sweep_patterns {sola} --patterns softmax --train 1 --out-dir out',
    'test': 'test {config} {weights} --out out/found.pkl --show-dir out/drawn --work-dir out/log',
    'train': 'train {config} --work-dir out/work --cfg-options train_cfg.max_iters=1',
}
# They print what they measure, and write nothing.
SILENT = {'compile_kernels', 'padding_leak'}


def test_no_tool_is_forgotten():
    # the files of the demo are those of `train` and `test`, and a picture: tests/tools/test_demo.py
    tools = {path.stem for path in TOOLS.glob('*.py')} - SILENT - {'demo'}
    assert {command.split()[0] for command in RUNS.values()} == tools


@pytest.mark.parametrize('name', RUNS)
def test_all_files_are_named(name, tool, tiny_seg, tiny_data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # These would be measurements and trainings in processes of their own.
    monkeypatch.setattr(cells._Worker, 'run', lambda worker, cell: dict(error='not run'))
    sola = tiny_seg.with_name('sola.py')
    sola.write_text(SOLA.format(base=tiny_seg.name))
    weights = tmp_path / 'weights.pth'
    model = build_model(Config.fromfile(tiny_seg))
    torch.save(dict(state_dict=model.state_dict(), meta={}), weights)
    paths = dict(config=tiny_seg, sola=sola, weights=weights, data=tiny_data)
    paths['image'] = tiny_data / 'images/val/0.png'
    script, *arguments = RUNS[name].format(**paths).split()
    # A comparison that failed as a whole is an error. It is written nevertheless.
    errors = {
        'trainings': '2 of 2 trainings failed',
        'patterns': 'all of 5 measurements failed: decay_softmax: not run',
    }
    failed = pytest.raises(SystemExit, match=errors[name]) if name in errors else nullcontext()
    with failed:
        tool(script).main(arguments)
    printed = ''.join(capfd.readouterr())
    out = Path('out')
    files = [path for path in out.rglob('*') if path.is_file()]
    assert files
    for file in files:
        named = [str(path) for path in (file, *file.parents) if path.parts[1:]]
        assert any(path in printed for path in named), f'{file} is not in: {printed}'
