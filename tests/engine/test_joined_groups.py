"""saga_mm.engine.JoinedGroupsOptimWrapperConstructor: fewer groups, the same updates."""

import copy

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from saga_mm.backbones import SAGA

ARCH = dict(embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2))
JOINED = 'saga_mm.JoinedGroupsOptimWrapperConstructor'


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = SAGA(ARCH, out_indices=(0, 1), drop_path_rate=0.0)
        self.head = nn.Linear(16, 3)
        self.same_head = nn.Sequential(self.head)

    def forward(self, x):
        return self.head(self.backbone(x)[-1].mean((2, 3)))


def build(model, constructor, **paramwise_cfg):
    return build_optim_wrapper(
        model,
        dict(
            constructor=constructor,
            optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1),
            paramwise_cfg=dict(dict(bypass_duplicate=True), **paramwise_cfg),
        ),
    ).optimizer


PARAMWISE = {
    'flat': (dict(flat_decay_mult=0.0), 2),
    'keys': (
        dict(
            flat_decay_mult=0.0,
            custom_keys={'head': dict(lr_mult=0.1), 'cpe': dict(betas=[0.8, 0.9])},
        ),
        4,
    ),
    'none': ({}, 1),
}


@pytest.mark.parametrize(('paramwise', 'number'), PARAMWISE.values(), ids=PARAMWISE.keys())
def test_updates_are_those_of_mmengine(paramwise, number):
    torch.manual_seed(0)
    model = Model()
    models = [model, copy.deepcopy(model)]
    optimizers = [
        build(model, constructor, **paramwise)
        for model, constructor in zip(
            models, (JOINED, 'DefaultOptimWrapperConstructor'), strict=True
        )
    ]
    assert len(optimizers[0].param_groups) == number
    for _ in range(3):
        images = torch.randn(2, 3, 32, 32)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize('constructor', [JOINED, 'saga_mm.LayerDecayOptimWrapperConstructor'])
def test_shared_parameters_are_not_updated_twice(constructor):
    rate = {} if constructor == JOINED else dict(decay_rate=0.9)
    with pytest.raises(
        ValueError, match=r'bypass_duplicate must be True .* one of shape \(3, 16\)'
    ):
        build(Model(), constructor, bypass_duplicate=False, flat_decay_mult=0.0, **rate)


def test_every_parameter_is_in_one_group():
    model = Model()
    model.backbone.stages[0].requires_grad_(False)
    groups = build(model, JOINED, flat_decay_mult=0.0).param_groups
    found = [id(parameter) for group in groups for parameter in group['params']]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
