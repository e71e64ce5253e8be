import re

import pytest
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn

import saga_mm
from saga_mm.engine import LayerDecayOptimWrapperConstructor
from saga_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

LR, DECAY = 0.1, 0.05
# Two blocks and one block are three layers above the stem.
BACKBONE = dict(
    type='saga_mm.SAGA',
    arch=dict(embed_dims=(8, 16), depths=(2, 1), num_heads=(1, 2)),
    out_indices=(0, 1),
)
SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor'),
    backbone=BACKBONE,
    decode_head=dict(
        type='FCNHead',
        in_channels=[8, 16],
        in_index=[0, 1],
        input_transform='resize_concat',
        channels=8,
        num_convs=1,
        num_classes=2,
        norm_cfg=dict(type='BN'),
    ),
)
DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=BACKBONE,
    neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=2,
        in_channels=8,
        feat_channels=8,
        stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='L1Loss'),
    ),
)
MODEL = {'mmseg': SEGMENTOR, 'mmdet': DETECTOR}


@pytest.fixture(params=['mmseg', 'mmdet'])
def scope(request, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.setattr(DefaultScope, '_instance_dict', DefaultScope._instance_dict.copy())
    init_default_scope(request.param)
    return request.param


@pytest.fixture
def model(scope):
    return MODELS.build(MODEL[scope])


def build(model, optimizer=None, **paramwise_cfg):
    return build_optim_wrapper(
        model,
        dict(
            constructor='saga_mm.LayerDecayOptimWrapperConstructor',
            optimizer=optimizer or dict(type='AdamW', lr=LR, weight_decay=DECAY),
            paramwise_cfg=paramwise_cfg,
        ),
    ).optimizer


def settings(model, optimizer):
    """Learning rate factor and weight decay of each parameter, which must be in one group."""
    groups = [
        (id(parameter), group['lr'] / LR, group['weight_decay'])
        for group in optimizer.param_groups
        for parameter in group['params']
    ]
    found = {key: values for key, *values in groups}
    assert len(found) == len(groups)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[key]: tuple(values) for key, values in found.items()}


def test_registered_once():
    assert OPTIM_WRAPPER_CONSTRUCTORS.parent.module_dict.keys().isdisjoint(
        OPTIM_WRAPPER_CONSTRUCTORS.module_dict
    )
    cls = OPTIM_WRAPPER_CONSTRUCTORS.get('LayerDecayOptimWrapperConstructor')
    assert cls is LayerDecayOptimWrapperConstructor


# By hand: decay_rate ** (number of layers above).
@pytest.mark.parametrize(
    ('part', 'factor'),
    [
        ('stages.0.embed.', 0.0625),
        ('stages.0.blocks.0.', 0.125),
        ('stages.0.blocks.1.', 0.25),
        ('stages.1.embed.', 0.5),
        ('stages.1.blocks.0.', 0.5),
        ('norms.0.', 1.0),
        ('norms.1.', 1.0),
    ],
)
def test_factors_in_a_segmentor_and_a_detector(model, part, factor):
    found = settings(model, build(model, decay_rate=0.5))
    names = [name for name in found if name.startswith(f'backbone.{part}')]
    assert names
    for name in names:
        assert found[name][0] == pytest.approx(factor), name


def test_every_trainable_parameter_is_in_one_group(model):
    found = settings(model, build(model, decay_rate=0.5))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert found[name][1] == (0 if parameter.ndim == 1 else DECAY), name
        if not name.startswith('backbone.'):
            assert found[name][0] == 1, name


def test_few_groups_in_order(model):
    groups = build(model, decay_rate=0.5).param_groups
    # Four layers and the other parameters, each with and without weight decay.
    assert len(groups) == 10
    assert [group['layer'] for group in groups[::2]] == [0, 1, 2, 3, None]


def test_frozen_parameters_are_left_out():
    model = nn.ModuleDict({'backbone': MODELS.build(dict(BACKBONE, frozen_stages=1))})
    found = settings(model, build(model, decay_rate=0.5))
    assert found.keys() == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    # The depth is that of the whole backbone.
    assert found['backbone.stages.1.embed.proj.weight'][0] == 0.5
    assert not any('stages.0' in name for name in found)


def test_mmengines_options_apply_as_well():
    model = nn.ModuleDict({'backbone': MODELS.build(BACKBONE), 'head': nn.Linear(2, 2)})
    custom = {'head': dict(lr_mult=10), 'blocks.1': dict(lr_mult=0.1, decay_mult=0.5)}
    optimizer = build(
        model, decay_rate=0.5, dwconv_decay_mult=0.0, flat_decay_mult=1.0, custom_keys=custom
    )
    found = settings(model, optimizer)
    assert found['head.weight'] == pytest.approx((10, DECAY))
    assert found['backbone.stages.0.blocks.1.norm1.weight'] == pytest.approx((0.025, DECAY / 2))
    assert found['backbone.stages.0.blocks.0.norm1.weight'] == pytest.approx((0.125, DECAY))
    assert found['backbone.stages.0.blocks.0.cpe.weight'] == pytest.approx((0.125, 0))


def test_an_optimizer_without_weight_decay_keeps_its_own():
    model = MODELS.build(BACKBONE)
    optimizer = build(model, optimizer=dict(type='SGD', lr=LR), decay_rate=1)
    assert set(settings(model, optimizer).values()) == {(1.0, 0)}


def test_table_is_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(
        'saga_mm.engine.layer_decay.print_log', lambda text, *_: lines.extend(text.split('\n'))
    )
    model = nn.ModuleDict({'backbone': MODELS.build(BACKBONE), 'head': nn.Linear(3, 5)})
    build(model, decay_rate=0.5)
    assert lines[:2] == [
        'layer-wise lr decay, lr 0.1:',
        'layer  lr factor  weight decay  parameters',
    ]
    rows = [line.split() for line in lines[2:]]
    assert rows[0][:3] == ['0', '0.0625', '0.05']
    # 3 x 5 weights; 5 biases and the norms of the outputs
    assert rows[-2:] == [['rest', '1', '0.05', '15'], ['rest', '1', '0', str(5 + 2 * (8 + 16))]]
    total = sum(int(row[3].replace(',', '')) for row in rows)
    assert total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, 'paramwise_cfg must be a dict with decay_rate, got {}'),
        (dict(decay_rate=0), r'decay_rate must be in \(0, 1\], got 0'),
        (dict(decay_rate=1.1), r'decay_rate must be in \(0, 1\], got 1.1'),
        (dict(decay_rate='0.9'), "decay_rate must be in .* got '0.9'"),
        (dict(decay_rate=True), 'decay_rate must be in .* got True'),
        (dict(decay_rate=0.9, num_layers=4), r"must have keys of .* got \['num_layers'\]"),
        (dict(decay_rate=0.9, norm_decay_mult=None), 'norm_decay_mult must be a number from 0'),
        (dict(decay_rate=0.9, bias_lr_mult=-1), 'bias_lr_mult must be a number from 0, got -1'),
        (dict(decay_rate=0.9, custom_keys={'norms': 3}), r"custom_keys\['norms'\] must be a dict"),
        (
            dict(decay_rate=0.9, custom_keys={'norms': dict(lr_mul=1)}),
            r"custom_keys\['norms'\] must be a dict with lr_mult or decay_mult, got {'lr_mul': 1}",
        ),
        (
            dict(decay_rate=0.9, custom_keys={'norms': dict(lr_mult='1')}),
            r"custom_keys\['norms'\].lr_mult must be a number from 0, got '1'",
        ),
        (
            dict(decay_rate=0.9, custom_keys={'backbon.': dict(lr_mult=1)}),
            "custom_keys must be parts of names of parameters such as 'stages.* got 'backbon.'",
        ),
        (dict(decay_rate=0.9, optimizer=dict(type='AdamW')), 'lr must be a number, got None'),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        build(MODELS.build(BACKBONE), **options)
    assert '\n' not in str(error.value)


def test_other_models_are_refused():
    with pytest.raises(
        ValueError, match=r'must have a backbone with get_layer_depth, .* got Linear'
    ):
        build(nn.Linear(2, 2), decay_rate=0.9)


@pytest.mark.parametrize('name', ['SAGA', 'SoLAVision', 'RAVLT'])
def test_every_constructor_sees_the_same_layers(name):
    """`get_layer_depth` for mmpretrain and for ours, `group_matcher` for timm."""
    arch = dict(embed_dims=(8, 8, 8, 8), depths=(1, 2, 1, 1), num_heads=(1, 1, 1, 1))
    model = saga_mm.registry.MODELS.get(name)(arch=arch)
    depths = {n: model.get_layer_depth(f'a.{n}', 'a.') for n, _ in model.named_parameters()}
    assert {layers for _, layers in depths.values()} == {7}
    assert {layer for layer, _ in depths.values()} == set(range(7))
    assert model.get_layer_depth('head.weight', 'backbone.') == (6, 7)
    assert depths == {n: model.get_layer_depth(n) for n in depths}
    # timm sorts by the position of the group, then by the numbers in the name and the suffix.
    matcher = model.group_matcher()
    patterns = [(0, matcher['stem'], None), *((1, *pattern) for pattern in matcher['blocks'])]
    keys = {}
    for n in depths:
        group, found, suffix = next(
            (group, found, suffix)
            for group, pattern, suffix in patterns
            if (found := re.match(pattern, n))
        )
        keys[n] = (group, *map(float, found.groups()), *(suffix or ()))
    order = sorted(set(keys.values()))
    assert {n: order.index(key) for n, key in keys.items()} == {
        n: layer for n, (layer, _) in depths.items()
    }
