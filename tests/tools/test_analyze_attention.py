"""tools/analyze_attention.py on tiny models and images; numbers agree with direct computation."""

import json

import cv2
import numpy as np
import pytest
import torch

from saga_mm.analysis.mixing import record_inputs, take_apart

SOLA = """
_base_ = './{base}'
model = dict(
    backbone=dict(
        _delete_=True,
        type='saga_mm.SoLAVision',
        arch=dict(embed_dims=(8, 16, 16, 16), num_heads=(1, 2, 2, 2)),
        layers=('LS', 'L', 'L', 'S'),
        linear='{linear}',
        out_indices=(0, 1),
    )
)
"""


@pytest.fixture
def analyze(tool):
    return tool('analyze_attention')


@pytest.fixture
def config(tiny_seg):
    def write(linear):
        path = tiny_seg.with_name(f'{linear}.py')
        path.write_text(SOLA.format(base=tiny_seg.name, linear=linear))
        return path

    return write


def load(analyze, text):
    """The model that the tool builds from NAME=CONFIG[:CHECKPOINT]."""
    arguments = ['rank', '--models', text, '--images', 'none']
    (one,) = analyze.load_models(analyze.parse_args([*arguments, '--device', 'cpu'])).values()
    return one.model


def test_configs_of_packages_are_models(analyze, monkeypatch):
    monkeypatch.setattr(analyze, 'load_subject', lambda *arguments: arguments)
    config = 'saga_mm::segmentation/upernet_saga_t_demo.py'
    specs = [f'new={config}', f'trained={config}:work_dirs/iter_1.pth', 'mine=a.py:s3://b/c.pth']
    arguments = ['rank', '--models', *specs, '--images', 'none', '--device', 'cpu']
    assert analyze.load_models(analyze.parse_args(arguments)) == {
        'new': (config, None, 'cpu'),
        'trained': (config, 'work_dirs/iter_1.pth', 'cpu'),
        'mine': ('a.py', 's3://b/c.pth', 'cpu'),
    }


def prepare(model, image):
    """The input that the backbone of a model gets for an image (H, W, C)."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return model.data_preprocessor(dict(inputs=[pixels], data_samples=None))['inputs']


def picture(path):
    assert cv2.imread(str(path)) is not None
    assert path.stat().st_size < 200_000


def test_rank(analyze, config, tiny_data, tmp_path, capsys):
    images = tiny_data / 'images' / 'val'
    specs = [f'a={config("gated")}', f'b={config("decay")}']
    folder = tmp_path / 'new' / 'folder'
    arguments = ['--images', str(images), '--size', '32', '48', '--out-dir', str(folder)]
    analyze.main(['rank', '--device', 'cpu', '--models', *specs, *arguments])
    found = json.loads((folder / 'rank.json').read_text())
    gated = found['a']
    assert {layer: one['mechanism'] for layer, one in gated.items()} == {
        '0.0': 'gated',
        '0.1': 'softmax',
        '1.0': 'gated',
    }
    assert set(gated['0.0']['matrices']) == {'state', 'state without gates', 'output'}
    assert gated['0.1']['gates'] == {}
    # Gates are open as at the start, with some noise.
    assert [gated['0.0']['gates'][kind][0] for kind in 'kv'] == [pytest.approx(0.88, abs=0.02)] * 2
    assert 0 < gated['0.0']['gates']['k'][1] < 0.05
    assert set(gated['0.1']['matrices']) == set(found['b']['0.0']['matrices']) == {'output'}

    # The median over both images and both heads, by hand.
    model = load(analyze, specs[0])
    ranks = []
    for path in sorted(images.iterdir()):
        image = cv2.resize(cv2.imread(str(path)), (48, 32), interpolation=cv2.INTER_AREA)
        x = record_inputs(model.backbone, prepare(model, image))['stages.1.blocks.0.attn']
        for state in take_apart(model.backbone.stages[1].blocks[0].attn, x).states['state'][0]:
            shares = torch.linalg.svdvals(state)
            shares = shares / shares.sum()
            ranks.append((-shares * shares.log()).sum().exp().item())
    expected = sorted(ranks)
    one = gated['1.0']['matrices']['state']
    assert one['effective_rank'] == pytest.approx((expected[1] + expected[2]) / 2)
    assert one['singular_values'][0] == 1
    assert one['full_rank'] == len(one['singular_values']) == 8

    printed = capsys.readouterr().out
    assert f'{one["effective_rank"]:.1f} / {one["numerical_rank"]:g} of 8' in printed
    assert (folder / 'rank.md').read_text() in printed
    picture(folder / 'rank_curves.png')
    picture(folder / 'rank_layers.png')


def test_rank_of_softmax_alone_in_a_deep_stage(analyze, tiny_seg, tiny_data, tmp_path):
    path = tiny_seg.with_name('deep.py')
    arch = dict(embed_dims=(4,), depths=(11,), num_heads=(1,))
    backbone = dict(_delete_=True, type='saga_mm.RAVLT', arch=arch, linear_stages=0)
    backbone.update(out_indices=(0,))
    path.write_text(f"_base_ = './{tiny_seg.name}'\nmodel = dict(backbone={backbone})\n")
    arguments = ['--images', str(tiny_data / 'images/val/0.png'), '--out-dir', str(tmp_path)]
    analyze.main(['rank', '--device', 'cpu', '--models', f'a={path}', *arguments])
    lines = (tmp_path / 'rank.md').read_text().splitlines()
    assert lines[2] == '| layer | a: output | a: gated output |'
    layers = [f'0.{i}' for i in range(11)]
    assert [line.split(' ')[1] for line in lines[4:15]] == layers
    # a new network attends to all tokens alike
    assert lines[-13] == '| layer | a |'
    assert lines[-11:] == [f'| {layer} | 64.0 of 64 |' for layer in layers]


def test_a_checkpoint_is_looked_into_not_the_start(analyze, config, tmp_path):
    path = config('plain')
    model = load(analyze, f'a={path}')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    torch.save(model.state_dict(), tmp_path / 'trained.pth')
    loaded = load(analyze, f'a={path}:{tmp_path / "trained.pth"}')
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_field_by_stage(analyze, config, tiny_det, tiny_data, tmp_path):
    models = [f'a={config("decay")}', f'b={tiny_det}']
    arguments = ['--images', str(tiny_data / 'images/val/0.png'), '--out-dir', str(tmp_path)]
    analyze.main(['field', '--device', 'cpu', '--models', *models, *arguments])
    found = json.loads((tmp_path / 'field.json').read_text())
    assert set(found) == {'a', 'b'}
    for stages in found.values():
        assert set(stages) == {'0', '1'}
        for one in stages.values():
            mass = torch.tensor(one['mass'])
            assert mass.shape == (8, 8)
            assert mass.sum().item() == pytest.approx(1, abs=1e-4)
            # Attention is global, and convolutions are not.
            assert (mass > 0).all()
            assert 0 < one['radii'][0] < one['radii'][1] < 24
    assert '| 1 | ' in (tmp_path / 'field.md').read_text()
    picture(tmp_path / 'field.png')


def test_field_by_depth(analyze, tmp_path, capsys):
    options = ['--tokens', '33', '--dim', '8', '--heads', '2', '--inputs', '1', '--depth', '4']
    lengths = ['--decay-lengths', '1', '1']
    kinds = ['--kinds', 'decay', 'softmax', 'plain']
    arguments = ['field', *kinds, *options, *lengths, '--device', 'cpu', '--out-dir', str(tmp_path)]
    analyze.main(arguments)
    lines = (tmp_path / 'field_by_depth.md').read_text().splitlines()
    assert lines[2] == '| depth | decay | softmax | plain | uniform |'
    found = json.loads((tmp_path / 'field_by_depth.json').read_text())
    decay, softmax, plain, uniform = ([radii[1] for radii in one] for one in found.values())
    assert lines[4].split(' | ')[1].endswith(f' / {decay[0]:.1f}')
    assert decay[0] < decay[1] < decay[3] < 0.6 * uniform[0]
    # Four times the layers give twice the radius, as the square root does.
    assert 1.4 < decay[3] / decay[0] < 3
    assert min(softmax + plain) > 0.9 * uniform[0]
    picture(tmp_path / 'field_by_depth.png')
    assert 'field_by_depth.json' in capsys.readouterr().out


def test_stacked_wkv_layers_follow_the_law(analyze, tmp_path):
    options = ['--tokens', '33', '--dim', '16', '--inputs', '2', '--depth', '8']
    lengths = ['--kinds', 'wkv', '--decay-lengths', '1', '1']
    analyze.main(['field', *options, *lengths, '--device', 'cpu', '--out-dir', str(tmp_path)])
    found = json.loads((tmp_path / 'field_by_depth.json').read_text())
    assert list(found) == ['wkv', 'uniform', 'law']
    # The variance of one layer, by hand; 90 % of a normal distribution is within 1.645 deviations.
    weights = [1.0 if d == 0 else np.exp(1 - abs(d)) for d in range(-99, 100)]
    variance = np.average([d**2 for d in range(-99, 100)], weights=weights)
    assert found['law'][7][1] == pytest.approx(1.645 * np.sqrt(8 * variance), rel=1e-3)
    # The law holds for deep stacks.
    for measured, law in zip(found['wkv'][7], found['law'][7], strict=True):
        assert abs(measured - law) <= 1
    # Four times the layers double the reach.
    assert found['wkv'][7][1] / found['wkv'][1][1] == pytest.approx(2, abs=0.4)
    picture(tmp_path / 'field_by_depth.png')


def test_the_decay_of_a_model_is_measured(analyze, config, tiny_det, tiny_data, tmp_path):
    models = [f'a={config("wkv")}', f'b={tiny_det}', f'c={config("decay")}']
    arguments = ['--images', str(tiny_data / 'images/val/0.png'), '--out-dir', str(tmp_path)]
    analyze.main(['field', '--device', 'cpu', '--models', *models, *arguments])
    found = json.loads((tmp_path / 'decay.json').read_text())
    assert {name: list(layers) for name, layers in found.items()} == {
        'a': ['0.0', '1.0'],
        'c': ['0.0', '1.0'],
    }
    for layer, side in {'0.0': 8, '1.0': 4}.items():
        assert found['a'][layer]['size'] == [side, side]
        # from e^3 to e^-5 per image
        low, median, high = (length / side**2 for length in found['a'][layer]['lengths'])
        assert [low, high] == pytest.approx([np.exp(-3), np.exp(5)], rel=1e-4)
        assert 0.5 < np.log(median) < 1.5
    # One head per scan starts at the geometric mean of 4 and 64.
    assert found['c']['1.0']['lengths'] == pytest.approx([16, 16, 16], rel=1e-4)
    assert '| 0.0 | ' in (tmp_path / 'decay.md').read_text()
    picture(tmp_path / 'decay.png')


def test_map(analyze, config, tiny_data, tmp_path):
    spec, path = f'a={config("gated")}', tiny_data / 'images/val/1.png'
    arguments = ['--images', str(path), '--pixel', '9', '30', '--layers', '0.0', '0.1']
    out = ['--out-dir', str(tmp_path)]
    analyze.main(['map', '--device', 'cpu', '--models', spec, *arguments, *out])
    found = json.loads((tmp_path / 'map_1.json').read_text())['a']
    assert list(found) == ['0.0', '0.1']
    # of 8 x 8 tokens
    assert found['0.0']['token'] == [2, 7]
    model = load(analyze, spec)
    inputs = record_inputs(model.backbone, prepare(model, cv2.imread(str(path))))
    for block, (layer, one) in enumerate(found.items()):
        mixing = take_apart(
            model.backbone.stages[0].blocks[block].attn, inputs[f'stages.0.blocks.{block}.attn']
        )
        # one head
        weights = mixing.row(2 * 8 + 7)[0, 0] * 64
        if one['mechanism'] == 'gated':
            weights = weights * mixing.gates['v'][0, 0].mean(-1)
        torch.testing.assert_close(
            torch.tensor(one['weights'], dtype=torch.float64).flatten(), weights.detach()
        )
        assert one['sums'] == [pytest.approx(1, abs=1e-6)]
        assert 1 < one['effective_tokens'][0] <= 64, layer
    assert (tmp_path / 'map_1.md').read_text().startswith(str(path))
    picture(tmp_path / 'map_1.png')


def test_mistakes_are_one_line(analyze, config, tiny_data, tiny_seg, tmp_path):
    good, images = f'a={config("gated")}', str(tiny_data / 'images' / 'val')
    other = tiny_seg.with_name('resnet.py')
    backbone = "dict(_delete_=True, type='mmseg.ResNet', depth=18)"
    other.write_text(f"_base_ = './{tiny_seg.name}'\nmodel = dict(backbone={backbone})\n")
    unknown = f'{other}: the backbone of the config must be one of saga_mm, got ResNet'
    large = tmp_path / 'large.png'
    cv2.imwrite(str(large), cv2.resize(cv2.imread(f'{images}/0.png'), (40, 40)))
    for command, message in {
        ('rank', '--models', good, '--images', images, str(large)): 'images must be of one size',
        ('rank', '--models', 'a', '--images', images): '--models must be NAME=CONFIG',
        ('rank', '--models', good, good, '--images', images): 'each name once',
        ('rank', '--models', good, '--images', images, '--size', '0', '9'): '--size must be two',
        ('rank', '--models', good, '--images', str(tiny_seg)): 'not readable as an image',
        ('rank', '--models', f'a={other}', '--images', images): unknown,
        ('field', '--models', good): '--models needs --images',
        ('field', '--depth', '0'): '--depth must be at least 1, got 0',
        ('field', '--heads', '3'): 'dim must be a multiple of num_heads, got 64 and 3',
        ('map', '--models', good, '--images', images, '--pixel', '32', '0'): '--pixel must lie in',
        (
            *('map', '--models', good, '--images', images, '--pixel', '1', '0'),
            *('--layers', '0.0', '3.0'),
        ): 'layers must be of 0.0, 0.1, 1.0, got 3.0',
    }.items():
        with pytest.raises(SystemExit) as stop:
            analyze.main([*command, '--device', 'cpu', '--out-dir', str(tmp_path / 'out')])
        assert str(stop.value.code).startswith('error: '), stop.value.code
        assert message in stop.value.code
        assert '\n' not in stop.value.code


def test_images_are_loaded_as_the_config_does(analyze, config, tiny_data, tmp_path):
    path = config('plain').with_name('bands.py')
    load = "dict(type='LoadImageFromFile', color_type='unchanged')"
    path.write_text(
        f"_base_ = './plain.py'\nmodel = dict(backbone=dict(in_channels=4))\n"
        "model['data_preprocessor'] = dict(mean=[9000.0], std=[5000.0])\n"
        f"test_dataloader = dict(dataset=dict(pipeline=[{load}, dict(type='PackSegInputs')]))\n"
    )
    image = np.random.default_rng(0).integers(0, 60000, (32, 32, 4)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / 'bands.png'), image)
    (one,) = analyze.load_models(
        analyze.parse_args(['rank', '--models', f'a={path}', '--images', 'none', '--device', 'cpu'])
    ).values()
    x = one.prepare(one.load(tmp_path / 'bands.png'))
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    torch.testing.assert_close(x[0], (pixels - 9000) / 5000)
    arguments = ['--images', str(tmp_path / 'bands.png'), '--out-dir', str(tmp_path / 'out')]
    pixel = ['--pixel', '9', '30', '--size', '48', '40', '--layers', '0.0']
    models = ['--models', f'a={path}']
    analyze.main(['map', '--device', 'cpu', *models, *arguments, *pixel])
    picture(tmp_path / 'out/map_bands.png')
    # A model for other bands loads the same file in its own way.
    other = f'b={config("gated")}'
    analyze.main(['rank', '--device', 'cpu', *models, other, *arguments])
