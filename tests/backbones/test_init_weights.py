"""Initial weights of a backbone: from `init_cfg`, from its layers, after the meta device."""

import copy
import pickle
from itertools import chain

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import PretrainedInit
from torch import nn

from saga_mm.backbones import RAVLT, SAGA, SoLAVision
from saga_mm.checkpoint import CheckpointError

ARCH = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2))
BACKBONES = [SAGA, SoLAVision, RAVLT]
PRETRAINED = ['Pretrained', 'mmengine.Pretrained', PretrainedInit]


def build(kind=SAGA, **options):
    return kind(arch=ARCH, out_indices=(0, 1), **options)


def save(path, module, prefix=''):
    weights = {prefix + name: weight for name, weight in module.state_dict().items()}
    torch.save({'state_dict': weights}, path)
    return str(path)


def forms(kind, **options):
    """An `init_cfg` with one entry, in each form that mmengine accepts."""
    entry = dict(type=kind, **options)
    return [entry, ConfigDict(entry), [entry], [ConfigDict(entry)]]


@pytest.mark.parametrize('kind', PRETRAINED)
@pytest.mark.parametrize('form', range(4))
def test_pretrained_weights_in_each_form(tmp_path, kind, form):
    source = build()
    path = save(tmp_path / 'a.pth', source, 'backbone.')
    options = dict(checkpoint=path, prefix='backbone.')
    model = build(init_cfg=forms(kind, **options)[form])
    model.init_weights()
    assert model.is_init
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name

    foreign = save(tmp_path / 'b.pth', nn.Linear(1, 1))
    model = build(init_cfg=forms(kind, checkpoint=foreign)[form])
    with pytest.raises(CheckpointError, match=r'b\.pth has no weight that fits SAGA'):
        model.init_weights()


def test_other_initialisers_come_before_weights_of_a_file(tmp_path):
    source = build()
    constant = dict(type='Constant', layer='Linear', val=3.0)
    pretrained = dict(type='Pretrained', checkpoint=save(tmp_path / 'a.pth', source))
    model = build(init_cfg=[pretrained, constant])
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    model = build(init_cfg=[constant])
    model.init_weights()
    assert (model.stages[1].blocks[0].ffn.fc1.weight == 3).all()


def test_an_override_is_reported_too(tmp_path):
    foreign = save(tmp_path / 'b.pth', nn.Linear(1, 1))
    override = dict(type='Pretrained', name='norms', checkpoint=foreign)
    model = build(init_cfg=dict(type='Constant', layer='Linear', val=3.0, override=override))
    with pytest.raises(CheckpointError, match=r'b\.pth has no weight that fits ModuleDict'):
        model.init_weights()


def tensors(model):
    return dict(chain(model.named_parameters(), model.named_buffers()))


@pytest.mark.parametrize('kind', BACKBONES)
def test_a_backbone_without_memory_gets_the_values_of_a_new_one(kind):
    with torch.device('meta'):
        model = build(kind, frozen_stages=1)
    with pytest.raises(ValueError, match='is on the meta device and has no memory') as error:
        model.init_weights()
    assert '\n' not in str(error.value)
    model.to_empty(device='cpu')
    with torch.no_grad():
        for value in tensors(model).values():
            value.fill_(77)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.manual_seed(3)
        copied.init_weights()
        torch.manual_seed(3)
        expected = tensors(build(kind, frozen_stages=1))
        assert expected.keys() == tensors(copied).keys()
        for name, value in tensors(copied).items():
            assert torch.equal(value, expected[name]), name


def test_memory_may_be_filled_from_a_file(tmp_path):
    source = build()
    path = save(tmp_path / 'a.pth', source)
    with torch.device('meta'):
        model = build(init_cfg=dict(type='Pretrained', checkpoint=path))
    model.to_empty(device='cpu').init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


def test_a_backbone_with_values_keeps_them():
    model = build()
    before = {name: value.clone() for name, value in tensors(model).items()}
    model.init_weights()
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
