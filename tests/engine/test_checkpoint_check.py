"""The weights of a runner after loading are those that the report names."""

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from saga_mm.checkpoint import CheckpointError, use_safe_loading
from saga_mm.engine import CheckpointCheckHook


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, inputs=None, data_samples=None, mode='tensor'):
        return self.layer(torch.ones(2, 3))


@pytest.fixture
def safe_loading(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    use_safe_loading()


def make_runner(folder, **options):
    return Runner(
        Model(),
        str(folder / 'work'),
        experiment_name=folder.name,
        default_hooks=dict(checkpoint=None, logger=None),
        **options,
    )


def prefixed(prefix):
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


CONTENTS = {
    'plain': lambda weights: weights,
    'state_dict': lambda weights: {'state_dict': weights},
    'model': lambda weights: {'model': weights, 'epoch': 3},
    'wrapped': lambda weights: {'model': prefixed('module.')(weights)},
    'compiled': lambda weights: {'state_dict': prefixed('_orig_mod.')(weights)},
    'compiled and wrapped': lambda weights: {'model': prefixed('module._orig_mod.')(weights)},
}


@pytest.mark.parametrize('complete', [True, False])
@pytest.mark.parametrize('name', CONTENTS)
def test_what_is_reported_is_what_is_loaded(tmp_path, safe_loading, name, complete):
    source = Model()
    for value in source.state_dict().values():
        value.copy_(torch.rand_like(value.float()) * 9 + 1)
    torch.save(CONTENTS[name](source.state_dict()), tmp_path / 'a.pth')
    hooks = [dict(type=CheckpointCheckHook, complete=complete)]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    runner.load_checkpoint(str(tmp_path / 'a.pth'))
    after = runner.model.state_dict()
    assert sum(not torch.equal(before[key], after[key]) for key in before) == len(before) == 7
    for key, value in source.state_dict().items():
        assert torch.equal(after[key], value), key


@pytest.mark.parametrize('container', ['state_dict', 'model'])
def test_an_average_of_the_weights_starts_from_them(tmp_path, safe_loading, container):
    source = Model()
    torch.save({container: source.state_dict()}, tmp_path / 'a.pth')
    hooks = [EMAHook(), CheckpointCheckHook(complete=True)]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    hooks[0].before_run(runner)
    runner.load_checkpoint(str(tmp_path / 'a.pth'))
    for model in (runner.model, hooks[0].ema_model.module):
        assert torch.equal(model.layer.weight, source.layer.weight)


def test_other_weights_are_refused(tmp_path, safe_loading):
    torch.save({'model': nn.Conv2d(1, 1, 1).state_dict()}, tmp_path / 'a.pth')
    hooks = [dict(type=CheckpointCheckHook, complete=False)]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    with pytest.raises(CheckpointError, match='0 loaded, 6 missing'):
        runner.load_checkpoint(str(tmp_path / 'a.pth'))


def test_hooks_may_change_a_checkpoint_before(tmp_path, safe_loading):
    source = Model()
    torch.save(prefixed('old.')(source.state_dict()), tmp_path / 'a.pth')

    class Rename(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            for name in list(checkpoint):
                checkpoint[name.removeprefix('old.')] = checkpoint.pop(name)

    # The check is registered first and must run last.
    hooks = [CheckpointCheckHook(complete=True), Rename()]
    runner = make_runner(tmp_path, custom_hooks=hooks)
    runner.load_checkpoint(str(tmp_path / 'a.pth'))
    assert torch.equal(runner.model.layer.weight, source.layer.weight)
