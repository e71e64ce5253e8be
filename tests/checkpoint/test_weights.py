"""Loading a checkpoint into a module does what the report says."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from saga_mm.checkpoint import (
    CheckpointError,
    extract_state_dict,
    load_matching,
    load_model_weights,
    load_weights,
    match_weights,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 1)


class Holder(nn.Module):
    """Has a submodule with the name that wrappers use."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)


class Renamed(nn.Linear):
    """A module whose weight had another name in an earlier version."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get('version', 1) < 2 and prefix + 'kernel' in state_dict:
            state_dict[prefix + 'weight'] = state_dict.pop(prefix + 'kernel')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def compiled(model):
    return torch.compile(model, backend='eager')


def compiled_backbone(model):
    model.backbone = compiled(model.backbone)
    return model


def wrapped_backbone(model):
    model.backbone = DataParallel(model.backbone)
    return model


WRAPPERS = {
    'none': lambda model: model,
    'compiled': compiled,
    'wrapped': DataParallel,
    'compiled, wrapped': lambda model: DataParallel(compiled(model)),
    'wrapped, compiled': lambda model: compiled(DataParallel(model)),
    'twice': lambda model: DataParallel(compiled(DataParallel(compiled(model)))),
    'compiled backbone': compiled_backbone,
    'wrapped backbone': wrapped_backbone,
    'compiled backbone, wrapped': lambda model: DataParallel(compiled_backbone(model)),
    'wrapped compiled backbone': lambda model: wrapped_backbone(compiled_backbone(model)),
}


def values(model):
    return [value.clone() for value in model.state_dict().values()]


def randomize(model):
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value.float()) * 9 + 1)
    return model


@pytest.mark.parametrize('container', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('name', WRAPPERS)
def test_names_of_wrappers_do_not_matter(tmp_path, name, container):
    source = randomize(Model())
    expected = values(source)
    weights = WRAPPERS[name](source).state_dict()
    torch.save({container: weights} if container else weights, tmp_path / 'a.pth')
    for target in (Model(), WRAPPERS[name](Model()), compiled_backbone(Model())):
        match = load_weights(target, tmp_path / 'a.pth')
        assert [len(names) for names in match] == [9, 0, 0, 0]
        for value, wanted in zip(values(target), expected, strict=True):
            assert torch.equal(value, wanted)
    # Also below a prefix.
    backbone = Model().backbone
    match = load_weights(backbone, tmp_path / 'a.pth', prefix='backbone.')
    assert [len(names) for names in match] == [7, 0, 0, 0]
    assert all(map(torch.equal, values(backbone), expected[:7]))


def test_a_part_that_is_called_module_keeps_its_weights():
    for wrap in (lambda model: model, DataParallel):
        source, target = Holder(), Holder()
        match = load_matching(target, extract_state_dict(wrap(source).state_dict()))
        assert [len(names) for names in match] == [4, 0, 0, 0]
        assert torch.equal(target.module.weight, source.module.weight)


@pytest.mark.parametrize('version', [None, 1])
def test_names_of_earlier_versions_are_those_that_the_module_knows(version):
    weights = OrderedDict({'0.kernel': torch.ones(2, 2), '0.bias': torch.ones(2)})
    if version:
        weights._metadata = {'0': {'version': version}}
    model = nn.Sequential(Renamed(2, 2))
    match = load_model_weights(model, {'state_dict': weights}, 'a.pth', complete=True)
    assert match == (['0.bias', '0.weight'], [], [], [])
    assert model[0].weight.sum() == 4
    # A file of the current version has no such weight.
    weights._metadata = {'0': {'version': 2}}
    assert match_weights(model, extract_state_dict(weights)).missing == ['0.weight']


SPOILED = {
    'missing': lambda w: w.pop('head.bias'),
    'unexpected': lambda w: w.update(x=torch.ones(1)),
    'shape': lambda w: w.update({'head.bias': torch.ones(7)}),
    'sparse': lambda w: w.update({'head.bias': torch.ones(1).to_sparse()}),
    'complex': lambda w: w.update({'head.bias': torch.ones(1, dtype=torch.complex64)}),
    'meta': lambda w: w.update({'head.bias': torch.ones(1, device='meta')}),
    'no counter': lambda w: w.pop('backbone.1.num_batches_tracked'),
    'nothing': lambda w: w.clear(),
}


@pytest.mark.parametrize('name', SPOILED)
def test_a_look_changes_nothing_and_tells_what_loading_does(name):
    weights = extract_state_dict(randomize(Model()).state_dict())
    SPOILED[name](weights)
    model = randomize(Model())
    before = model.state_dict(), values(model)
    match = match_weights(model, weights)
    assert all(map(torch.equal, before[1], values(model)))
    assert load_matching(model, weights) == match
    changed = {
        key
        for key, old, new in zip(before[0], before[1], values(model), strict=True)
        if not torch.equal(old, new)
    }
    assert changed == set(match.loaded)


@pytest.mark.parametrize('name', ['missing', 'shape', 'nothing'])
def test_an_incomplete_checkpoint_changes_nothing(name):
    weights = extract_state_dict(randomize(Model()).state_dict())
    SPOILED[name](weights)
    model = randomize(Model())
    before = values(model)
    with pytest.raises(CheckpointError, match=r'a\.pth does not fit the model of the config'):
        load_model_weights(model, {'model': weights}, 'a.pth', complete=True)
    assert all(map(torch.equal, before, values(model)))


def test_names_are_shown_without_what_a_terminal_obeys(tmp_path):
    torch.save({'\x1b[2J\u202e': torch.ones(1)}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'\\x1b\[2J\\u202e') as error:
        load_weights(Model(), tmp_path / 'a.pth')
    assert str(error.value).isprintable()
    weights = {**Model().state_dict(), '\x1b[2J': torch.ones(1)}
    assert str(match_weights(Model(), weights)).isprintable()
