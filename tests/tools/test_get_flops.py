"""tools/get_flops.py on tiny models."""

import json

import pytest


def test_detector_part_by_part(tool, tiny_det, tmp_path, capsys):
    path = tmp_path / 'new' / 'cost.json'
    tool('get_flops').main([str(tiny_det), '--size', '48', '64', '--json', str(path)])
    rows = capsys.readouterr().out.splitlines()
    names = [row.split('|')[1].strip() for row in rows[2:-1]]
    assert rows[-1] == f'wrote {path}'
    assert names == [
        'backbone',
        'backbone.stages.0',
        'backbone.stages.1',
        'neck',
        'bbox_head',
        'all',
    ]
    costs = json.loads(path.read_text())
    parts = [costs[name]['flops'] for name in ('backbone', 'neck', 'bbox_head')]
    assert all(parts)
    assert costs['']['flops'] == sum(parts)
    stages = [costs[f'backbone.stages.{i}']['flops'] for i in range(2)]
    assert all(stages)
    assert sum(stages) == costs['backbone']['flops']


def test_cost_is_linear_in_the_pixels(tool, tiny_seg, tmp_path, capsys):
    flops = []
    for side in (64, 128):
        path = tmp_path / f'{side}.json'
        tool('get_flops').main([str(tiny_seg), '--size', f'{side}', f'{side}', '--json', str(path)])
        flops.append(json.loads(path.read_text())['backbone']['flops'])
    assert flops[1] == 4 * flops[0]


def test_a_mask_of_the_padding_costs_no_product(tool, tiny_seg, tmp_path):
    path = tmp_path / 'cost.json'
    flops = []
    for pad_mask in (False, True):
        options = ['--cfg-options', f'model.backbone.pad_mask={pad_mask}']
        tool('get_flops').main([str(tiny_seg), '--size', '64', '64', '--json', str(path), *options])
        flops.append(json.loads(path.read_text())['']['flops'])
    assert flops[0] == flops[1] > 0


def test_what_is_not_counted_is_named(tool, tiny_seg, capsys):
    config = tiny_seg.with_name('auxiliary.py')
    head = dict(type='FCNHead', in_channels=8, in_index=0, channels=4, num_classes=2)
    config.write_text(f"_base_ = './{tiny_seg.name}'\nmodel = dict(auxiliary_head={head})\n")
    tool('get_flops').main([str(config), '--size', '64', '64'])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == 'not counted: auxiliary_head (0.00M parameters), inference does without it'


def test_a_config_of_classes_in_place_of_names(tool, pure_python, capsys):
    tool('get_flops').main([str(pure_python), '--size', '64', '64'])
    assert '| decode_head | 0.00 |' in capsys.readouterr().out


def test_bands_of_the_image_are_those_of_the_config(tool, tiny_seg, tmp_path):
    path, flops = tmp_path / 'cost.json', []
    for config in (tiny_seg, tiny_seg.with_name('resnet.py')):
        for bands in (3, 5):
            if config != tiny_seg:
                backbone = dict(_delete_=True, type='ResNet', depth=18, out_indices=(0, 1))
                head = 'decode_head=dict(in_channels=[64, 128])'
                model = f'model = dict(backbone={backbone}, {head})'
                config.write_text(f"_base_ = './{tiny_seg.name}'\n{model}\n")
            options = ['--cfg-options', f'model.backbone.in_channels={bands}']
            arguments = [str(config), '--size', '64', '64', '--json', str(path), *options]
            tool('get_flops').main(arguments)
            flops.append(json.loads(path.read_text())['']['flops'])
    assert flops[0] < flops[1] and flops[2] < flops[3]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--size', '0', '64'], 'error: --size must be two positive numbers, got [0, 64]'),
        (['--cfg-options', 'model.backbone.arch=huge'], 'arch must be one of'),
        (['--cfg-options', 'optim_wraper.lr=1'], "has no entry 'optim_wraper'"),
    ],
)
def test_errors_are_one_line(tool, tiny_seg, options, message):
    with pytest.raises(SystemExit) as error:
        tool('get_flops').main([str(tiny_seg), *options])
    assert message in str(error.value)
    assert '\n' not in str(error.value)
