"""Tests for SoLA-Vision alone."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from saga_mm.analysis.cost import measure_cost
from saga_mm.attention import (
    DecayLinearAttention,
    GatedLinearAttention,
    SoftmaxAttention,
    WKVAttention,
)
from saga_mm.backbones import SAGA, SoLAVision
from saga_mm.backbones.sola_vision import PRESETS, TABLE_2
from saga_mm.layers import ChannelMix, ConvStem, HiddenStateBridge, PatchEmbed

SMALL = dict(embed_dims=(8, 16, 24, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))
T_PATTERN = ('LL', 'LL', 'LLSLLS', 'LS')
T_BRIDGES = ((1, 2, 3, 3), (2, 2, 3, 6), (3, 2, 4, 2))


def on_meta(*args, **options):
    with torch.device('meta'):
        return SoLAVision(*args, **options)


def mixers(model):
    return [[type(block.attn) for block in stage.blocks] for stage in model.stages]


def bridges_of(model):
    """(source stage, source layer, target stage, target layer) of each bridge, from the modules."""
    sources = [
        (i, j)
        for i, stage in enumerate(model.stages, 1)
        for j, block in enumerate(stage.blocks, 1)
        if block.attn.returns_state
    ]
    assert all(len(stage.bridges) == len(stage.sources) for stage in model.stages)
    return tuple(
        (*sources[source], i, layer + 1)
        for i, stage in enumerate(model.stages, 1)
        for layer, source in stage.sources.items()
    )


def products_by_hand(dims, pattern, bridges, size):
    """Multiply-adds of a forward pass, without norms and element-wise operations such as WKV."""
    tokens = [-(-size[0] // 4 // 2**i) * -(-size[1] // 4 // 2**i) for i in range(4)]
    # Patches of 4 x 4 pixels, and merging of 2 x 2 tokens.
    found = tokens[0] * 48 * dims[0] + sum(tokens[i] * 4 * dims[i - 1] * dims[i] for i in (1, 2, 3))
    for n, dim, letters in zip(tokens, dims, pattern, strict=True):
        # R, K, V or q, k, v, and the output: 4; FFN: 4 + 4 + 1.
        found += len(letters) * 13 * n * dim**2 + letters.count('S') * 2 * n**2 * dim
    return found + sum(tokens[t - 1] * dims[s - 1] * dims[t - 1] for s, _, t, _ in bridges)


def test_flops_by_hand():
    model = on_meta(SMALL | dict(depths=(1, 1, 2, 2)), ('L', 'L', 'LS', 'LS')).eval()
    cost = measure_cost(model, lambda: model(torch.empty(1, 3, 64, 96, device='meta')))['']
    bridges = ((1, 1, 3, 2), (2, 1, 4, 2))
    assert bridges_of(model) == bridges
    products = products_by_hand(SMALL['embed_dims'], model.pattern, bridges, (64, 96))
    assert cost.flops == 2 * products


# Published, with the classifier: millions of parameters, and GFLOPs, which are multiply-adds, for
# 224 x 224 pixels. The GFLOPs of UperNet (512 x 512 pixels) and Mask R-CNN (800 x 1280) are those
# of the backbone alone. Those of S contradict each other, and those of Mask R-CNN would need more
# softmax layers than the figure of T has; these are left out.
@pytest.mark.parametrize(
    ('arch', 'pattern', 'bridges', 'parameters', 'flops'),
    [
        ('tiny', T_PATTERN, T_BRIDGES, 6.59, {(224, 224): 1.89, (512, 512): 10.88}),
        ('small', T_PATTERN, T_BRIDGES, 30.69, {(512, 512): 27.22}),
        (
            'base',
            ('LL', 'LL', 'SLLSLLSLLSLLSLLS', 'LS'),
            ((1, 2, 3, 1), (2, 2, 3, 4), (3, 15, 4, 2)),
            88.26,
            {(224, 224): 14.96, (512, 512): 89.04, (800, 1280): 403.0},
        ),
    ],
)
def test_sizes_are_the_published_ones(arch, pattern, bridges, parameters, flops):
    model = on_meta(arch)
    assert model.pattern == on_meta(arch[0], pattern).pattern == pattern
    assert bridges_of(model) == bridges
    dims = SoLAVision.arch_settings[arch].embed_dims
    # A classifier reads only the last map, so the others have no norms.
    used = [*model.stages.parameters(), *model.norms['3'].parameters()]
    total = sum(p.numel() for p in used) + 1000 * (dims[3] + 1)
    assert total / 1e6 == pytest.approx(parameters, rel=0.03)
    for size, published in flops.items():
        found = products_by_hand(dims, pattern, bridges, size)
        found += 1000 * dims[3] * (size == (224, 224))
        assert found / 1e9 == pytest.approx(published, rel=0.05), size


def test_a_pattern_sets_depths_and_mixers():
    pattern = ('L', 'LL', 'SLS', 'SL')
    model = SoLAVision(SMALL, pattern)
    kinds = dict(L=WKVAttention, S=SoftmaxAttention)
    assert mixers(model) == [[kinds[letter] for letter in letters] for letters in pattern]
    without_depths = {key: value for key, value in SMALL.items() if key != 'depths'}
    for same in (pattern, list(pattern), 'L/LL/SLS/SL', 'L, LL, SLS, SL'):
        assert mixers(SoLAVision(without_depths, same)) == mixers(model)
        assert mixers(SoLAVision(without_depths, layers=same)) == mixers(model)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert {type(block.ffn) for block in blocks} == {ChannelMix}
    assert all(block.cpe is block.attn.lepe is block.ffn.shift is None for block in blocks)


@pytest.mark.parametrize(
    ('linear', 'kind', 'parts'),
    [
        ('wkv', WKVAttention, 3),
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
    assert mixers(SAGA(SMALL))[0] == [GatedLinearAttention]


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
@pytest.mark.filterwarnings('ignore:pattern=')
def test_presets(preset, late):
    assert tuple(PRESETS[preset](depth) for depth in (1, 2, 3, 7)) == late
    pattern = on_meta({**SMALL, 'depths': (2, 1, 7, 3)}, preset).pattern
    early = ('SS', 'S') if preset == 'softmax' else ('LL', 'L')
    assert pattern == (*early, late[3], late[2])


@pytest.mark.parametrize('pattern', [*TABLE_2, 'L', 'LSSSSSSS'])
def test_one_string_is_stage_3(pattern):
    model = on_meta('tiny', pattern)
    assert model.pattern == ('LL', 'LL', pattern, 'LL')
    assert mixers(on_meta('tiny', model.pattern)) == mixers(model)


@pytest.mark.parametrize(
    'pattern',
    [
        'every_4th',
        '',
        ('L', 'L', 'L'),
        ('L', 'L', 'L', 'L', 'L'),
        ('L', 'L', '', 'L'),
        ('L', 'L', 'LX', 'L'),
        ('L', 'L', 'l', 'L'),
        ('L', 'L', 'L\n', 'L'),
        ('L', 'L', 2, 'L'),
        'L/L/L',
        'L/L/X/L',
        {'L', 'S'},
        3,
        None,
    ],
)
def test_other_patterns_are_errors(pattern):
    with pytest.raises(ValueError, match='pattern must be 4 strings of L and S, such as') as error:
        SoLAVision(SMALL, pattern)
    assert str(error.value).endswith(f'got {pattern!r}')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(linear='gate'), "linear must be one of .* got 'gate'"),
        (dict(feature_map='gelu'), "feature_map must be one of .* got 'gelu'"),
        (dict(impl='cuda'), "impl must be one of .* got 'cuda'"),
        (dict(decay_per='pixel'), "decay_per must be one of .* got 'pixel'"),
        (dict(patch_embed='swin'), "patch_embed must be one of .* got 'swin'"),
        (dict(token_shift='shift'), "token_shift must be None or 'q_shift', got 'shift'"),
        (dict(pattern='last', layers='front'), "give one of them, got 'front' and 'last'"),
        (
            dict(arch=dict(embed_dims=(8, 8), depths=(1, 1), num_heads=(1, 1))),
            'arch must have 4 stages, got 2',
        ),
    ],
)
def test_wrong_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        SoLAVision(**{'arch': SMALL} | options)


@pytest.mark.parametrize(
    ('pattern', 'expected'),
    [
        (T_PATTERN, T_BRIDGES),
        ('LLSLLS', T_BRIDGES[:2]),
        ('LLLLLL', ()),
        ('SSLLLL', ((1, 2, 3, 1), (2, 2, 3, 2))),
        ('LSLSLS', ((1, 2, 3, 2), (2, 2, 3, 4))),
        ('SSSSSS', ((1, 2, 3, 1), (2, 2, 3, 2))),
        ('softmax', ()),
        ('LL/SL/LS/SL', ((1, 2, 2, 1), (2, 2, 3, 2), (3, 1, 4, 1))),
        ('S/L/LS/LS', ()),
    ],
)
@pytest.mark.filterwarnings('ignore:pattern=')
def test_the_bridges_of_a_pattern(pattern, expected):
    assert bridges_of(on_meta('tiny', pattern)) == expected


@pytest.mark.parametrize(
    ('bridges', 'expected'),
    [
        ((), ()),
        ([], ()),
        ([[2, 1, 3, 6]], ((2, 1, 3, 6),)),
        # From one stage, into one stage, and one source of two.
        (((1, 1, 4, 2), (3, 4, 3, 6), (1, 1, 3, 3)), ((1, 1, 3, 3), (3, 4, 3, 6), (1, 1, 4, 2))),
    ],
)
def test_explicit_bridges(bridges, expected):
    model = on_meta('tiny', bridges=bridges)
    assert sorted(bridges_of(model)) == sorted(expected)


@pytest.mark.parametrize(
    ('bridges', 'message'),
    [
        ('none', "bridges must be 'auto' or a sequence of .* got 'none'"),
        (None, "bridges must be 'auto' or a sequence of .* got None"),
        (False, "bridges must be 'auto' or a sequence of .* got False"),
        ((1, 2, 3, 3), 'bridges must contain .* got 1$'),
        (((1, 2, 3),), r'bridges must contain .* got \(1, 2, 3\)$'),
        (((1, 2, 3, 7),), r'bridges must contain .* got \(1, 2, 3, 7\)$'),
        (((0, 2, 3, 3),), r'bridges must contain .* got \(0, 2, 3, 3\)$'),
        ((('1', 2, 3, 3),), 'bridges must contain'),
        (((True, 2, 3, 3),), 'bridges must contain'),
        (((1, 2, 3, 2),), r'from a linear layer to a softmax layer after it, got \(1, 2, 3, 2\)'),
        (((3, 3, 3, 6),), r'from a linear layer to a softmax layer after it, got \(3, 3, 3, 6\)'),
        (((3, 4, 3, 3),), r'from a linear layer to a softmax layer after it, got \(3, 4, 3, 3\)'),
        (
            ((1, 2, 3, 3), (2, 2, 3, 3)),
            r'one bridge for each softmax layer, got \(1, 2, 3, 3\) and \(2, 2, 3, 3\)',
        ),
    ],
)
def test_wrong_bridges_are_named(bridges, message):
    with pytest.raises(ValueError, match=message) as error:
        on_meta('tiny', bridges=bridges)
    assert '\n' not in str(error.value)


def test_bridges_beyond_the_last_stage_are_not_built():
    model = on_meta('tiny', out_indices=(0, 2))
    assert bridges_of(model) == T_BRIDGES[:2]
    assert bridges_of(on_meta('tiny', out_indices=1)) == ()
    frozen = SoLAVision(SMALL, frozen_stages=3).train()
    assert not any(p.requires_grad for p in frozen.stages[2].bridges.parameters())
    assert all(p.requires_grad for p in frozen.stages[3].bridges.parameters())


@pytest.mark.parametrize('linear', ['wkv', 'gated', 'decay'])
@pytest.mark.parametrize('pad_mask', [False, True])
def test_a_softmax_layer_gets_its_bridge(linear, pad_mask):
    """The forward pass, written out with the modules of a small network."""
    options = dict(linear=linear, pad_mask=pad_mask, lepe_kernel_size=3)
    model = SoLAVision(SMALL, 'L/L/LS/S', **options).eval()
    assert bridges_of(model) == ((1, 1, 3, 2), (2, 1, 4, 1))
    images = torch.randn(2, 3 + pad_mask, 72, 50)
    masks = [None] * 4
    if pad_mask:
        images[:, 3], images[1, 3, 40:] = 1, 0
        masks = [images[:, 3, :: 4 * 2**i, :: 4 * 2**i, None] > 0 for i in range(4)]
    x, states = images[:, :3].permute(0, 2, 3, 1), []
    finer = images[:, 3:].permute(0, 2, 3, 1) > 0 if pad_mask else None
    for i, (stage, mask) in enumerate(zip(model.stages, masks, strict=True)):
        x = stage.embed(x, finer)
        for j, block in enumerate(stage.blocks):
            if (i, j) in ((2, 1), (3, 0)):
                h, inside = states[i - 2], masks[i - 2]
                inside = torch.ones_like(h[..., :1]) if inside is None else inside.float()
                h, inside = (
                    F.avg_pool2d(y.permute(0, 3, 1, 2), 4, ceil_mode=True, divisor_override=1)
                    for y in (torch.where(inside > 0, h, 0), inside)
                )
                h = (h / inside.clamp(min=1)).permute(0, 2, 3, 1)
                x = x + x.sigmoid() * stage.bridges[str(j)].linear(h)
            if (i, j) in ((0, 0), (1, 0)):
                attn = block.attn
                y, h = attn.mix(attn.in_proj(block.norm1(x)), mask)
                states.append(h)
                x = x + attn.proj(y)
                x = x + block.ffn(block.norm2(x))
            else:
                x = block(x, mask)
        finer = mask
        out = model.norms[str(i)](x)
        out = out if mask is None else out * mask
        expected = model(images)[i].permute(0, 2, 3, 1)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_every_part_of_the_bridges_learns():
    model = SoLAVision(SMALL, drop_path_rate=0)
    (model(torch.randn(1, 3, 64, 96))[3] * torch.randn(32, 2, 3)).sum().backward()
    bridges = [bridge for stage in model.stages for bridge in stage.bridges.values()]
    assert [type(bridge) for bridge in bridges] == [HiddenStateBridge] * 2
    assert all(p.grad.any() for bridge in bridges for p in bridge.parameters())


@pytest.mark.parametrize(
    ('patch_embed', 'kinds', 'kernel_sizes'),
    [
        ('plain', [PatchEmbed] * 4, [4, 2, 2, 2]),
        ('overlap', [PatchEmbed] * 4, [7, 3, 3, 3]),
        ('conv', [ConvStem] + [PatchEmbed] * 3, [None, 3, 3, 3]),
    ],
)
def test_embeddings(patch_embed, kinds, kernel_sizes):
    embeds = [stage.embed for stage in on_meta(SMALL, patch_embed=patch_embed).stages]
    assert [type(embed) for embed in embeds] == kinds
    for embed, size in zip(embeds, kernel_sizes, strict=True):
        assert size is None or embed.proj.kernel_size == (size, size)


def test_no_weight_decay_on_decays_and_bonuses():
    """The optimizer settings of the configs leave out parameters with one axis."""
    model = on_meta(SMALL, token_shift='q_shift')
    own = [n for n, _ in model.named_parameters() if n.endswith(('decay', 'bonus', 'mix'))]
    assert len(own) == 2 * 3 + 4
    assert all(model.get_parameter(name).ndim == 1 for name in own)


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
@pytest.mark.parametrize(
    'options', [dict(linear='decay'), dict(token_shift='q_shift', decay_per='token')]
)
def test_options_stay_close_under_autocast(options, dtype):
    model = SoLAVision(SMALL, **options).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.autocast('cpu', dtype=dtype), torch.no_grad():
        outs = model(x)
    for out, truth in zip(outs, model(x), strict=True):
        assert (out.float() - truth).norm() / truth.norm() < 3e-2


def test_bridges_between_any_stages_run():
    bridges = ((1, 1, 4, 2), (3, 1, 3, 2), (1, 1, 3, 3))
    model = SoLAVision(SMALL, 'L/L/LSS/LS', bridges=bridges)
    x = torch.randn(1, 3, 65, 33)
    assert [out.shape[2:] for out in model(x)] == [(17, 9), (9, 5), (5, 3), (3, 2)]
    for out, other in zip(model(x), SoLAVision(SMALL, 'L/L/LSS/LS', bridges=())(x), strict=True):
        assert out.shape == other.shape
