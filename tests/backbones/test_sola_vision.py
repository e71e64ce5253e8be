"""Tests for SoLA-Vision alone."""

import warnings

import pytest
import torch

from saga_mm.attention import DecayLinearAttention, GatedLinearAttention, SoftmaxAttention
from saga_mm.backbones import SAGA, SoLAVision
from saga_mm.backbones.sola_vision import PRESETS
from saga_mm.layers import HSB

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))


def mixers(model):
    return [[type(block.attn) for block in stage.blocks] for stage in model.stages]


@pytest.mark.parametrize(
    ('arch', 'layers', 'millions'),
    [
        ('tiny', ('LL', 'LL', 'LLSLLS', 'LS'), 15.3),
        ('small', ('LLL', 'LLLLL', 'LLSLLSLLSLLS', 'LLS'), 26.2),
        ('base', ('LLLL', 'LLLLLL', 'LLSLLSLLSLLSLLS', 'LLSLLS'), 49.1),
    ],
)
def test_arch_names(arch, layers, millions):
    with torch.device('meta'):
        model, same = SoLAVision(arch), SoLAVision(arch[0], layers)
    assert model.layers == same.layers == layers
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == sum(p.numel() for p in same.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_pattern_sets_depths_and_mixers():
    layers = ('L', 'LL', 'SLS', 'SL')
    model = SoLAVision(SMALL, layers)
    kinds = dict(L=GatedLinearAttention, S=SoftmaxAttention)
    assert mixers(model) == [[kinds[letter] for letter in pattern] for pattern in layers]
    without_depths = {key: value for key, value in SMALL.items() if key != 'depths'}
    assert mixers(SoLAVision(without_depths, layers)) == mixers(model)
    # The linear layers are those of SAGA.
    assert {kind for stage in mixers(SAGA(SMALL)) for kind in stage} == {kinds['L']}


@pytest.mark.parametrize(
    ('linear', 'kind', 'parts'),
    [
        ('gated', GatedLinearAttention, 5),
        ('plain', GatedLinearAttention, 3),
        ('decay', DecayLinearAttention, 3),
    ],
)
def test_kinds_of_linear_layers(linear, kind, parts):
    model = SoLAVision(SMALL, ('L', 'L', 'L', 'S'), linear=linear)
    assert mixers(model) == [[kind]] * 3 + [[SoftmaxAttention]]
    projection = model.stages[0].blocks[0].attn.in_proj
    assert projection.out_features == parts * projection.in_features
    model(torch.randn(2, 3, 45, 61))[3].sum().backward()
    assert all(p.grad is not None for p in model.stages.parameters())


@pytest.mark.parametrize(
    ('preset', 'late'),
    [
        ('linear', ('L', 'LL', 'LLL', 'LLLLLLL')),
        ('every_3rd', ('S', 'LS', 'LLS', 'SLLSLLS')),
        ('last', ('S', 'LS', 'LLS', 'LLLLSSS')),
        ('front', ('S', 'SL', 'SLL', 'SSSLLLL')),
        ('softmax', ('S', 'SS', 'SSS', 'SSSSSSS')),
    ],
)
@pytest.mark.filterwarnings('ignore:layers=')
def test_presets(preset, late):
    assert tuple(PRESETS[preset](depth) for depth in (1, 2, 3, 7)) == late
    with torch.device('meta'):
        layers = SoLAVision({**SMALL, 'depths': (2, 1, 7, 3)}, preset).layers
    early = ('SS', 'S') if preset == 'softmax' else ('LL', 'L')
    assert layers == (*early, late[3], late[2])


@pytest.mark.parametrize(
    'layers',
    [
        'LLLL',
        'every_4th',
        ('L', 'L', 'L'),
        ('L', 'L', 'L', 'L', 'L'),
        ('L', 'L', '', 'L'),
        ('L', 'L', 'LX', 'L'),
        ('L', 'L', 'l', 'L'),
        ('L', 'L', 'L\n', 'L'),
        ('L', 'L', 2, 'L'),
        {'L', 'S'},
        3,
        None,
    ],
)
def test_anything_but_four_strings_of_letters_is_an_error(layers):
    with pytest.raises(ValueError, match='layers must be 4 strings of L and S, such as') as error:
        SoLAVision(SMALL, layers)
    assert str(error.value).endswith(f'got {layers!r}')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(linear='gate'), "linear must be one of .* got 'gate'"),
        (dict(feature_map='gelu'), "feature_map must be one of .* got 'gelu'"),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
        (
            dict(arch=dict(embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1))),
            'arch must have 4 stages, got 2',
        ),
    ],
)
def test_wrong_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        SoLAVision(**{'arch': SMALL} | options)


@pytest.mark.parametrize('size', [(1, 1), (64, 64), (75, 130)])
def test_untrained_hsb_changes_nothing(size):
    model = SoLAVision(SMALL).eval()
    without = SoLAVision(SMALL, hsb=False).eval()
    missing, unexpected = without.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert {key.split('.')[:3][-1] for key in unexpected} == {'hsb'}
    x = torch.randn(1, 3, *size)
    for out, expected in zip(model(x), without(x), strict=True):
        assert torch.equal(out, expected)
    torch.nn.init.ones_(model.stages[2].hsb.scale)
    for i, (out, expected) in enumerate(zip(model(x), without(x), strict=True)):
        assert torch.equal(out, expected) == (i < 2)


def test_hsb_learns():
    model = SoLAVision(SMALL)
    optimizer = torch.optim.SGD(model.stages[2].hsb.parameters(), lr=1.0)
    weights = torch.randn(1, 24, 4, 6)
    for _ in range(2):
        model.zero_grad()
        (model(torch.randn(1, 3, 64, 96))[2] * weights).sum().backward()
        optimizer.step()
    # The first step changes only the factor; the other parameters get a gradient after that.
    assert all(p.grad.any() for p in model.stages[2].hsb.parameters())


@pytest.mark.parametrize('size', [(1, 1), (4, 7), (13, 9)])
def test_hsb_takes_maps_of_any_size(size):
    # (H, W) of stage 1, halved twice, rounded up
    half = [-(-side // 2) for side in size]
    quarter = [-(-side // 2) for side in half]
    maps = [(torch.randn(2, *size, 4), None), (torch.randn(2, *half, 6), None)]
    hsb = HSB((4, 6), 8, strides=(4, 2))
    torch.nn.init.ones_(hsb.scale)
    x = torch.randn(2, *quarter, 8)
    assert hsb(x, maps).shape == x.shape
    # Each map has an effect.
    for i in range(2):
        other = [(m + 1, mask) if j == i else (m, mask) for j, (m, mask) in enumerate(maps)]
        assert not torch.allclose(hsb(x, maps), hsb(x, other))


def test_hsb_belongs_to_stage_3():
    assert not any('hsb' in key for key in SoLAVision(SMALL, out_indices=(0, 1)).state_dict())
    model = SoLAVision(SMALL, frozen_stages=3).train()
    assert not any(p.requires_grad for p in model.stages[2].hsb.parameters())


def test_softmax_at_high_resolution_is_warned_about_once():
    with pytest.warns(UserWarning, match='softmax attention at high resolution') as caught:
        SoLAVision(SMALL, ('LSS', 'SS', 'S', 'S'))
    (warning,) = caught
    assert '65,536 x 65,536 scores per head in stage 1' in str(warning.message)
    assert '16,384 x 16,384 scores per head in stage 2' in str(warning.message)
    assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SoLAVision(SMALL, ('L', 'L', 'S', 'S'))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_decay_stays_close_under_autocast(dtype):
    model = SoLAVision(SMALL, linear='decay').eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.autocast('cpu', dtype=dtype), torch.no_grad():
        outs = model(x)
    for out, truth in zip(outs, model(x), strict=True):
        assert (out.float() - truth).norm() / truth.norm() < 3e-2
