import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from saga_mm.checkpoint import CheckpointError, load_file
from saga_mm.engine import CheckpointCheckHook, ExactResumeHook
from saga_mm.engine.exact_resume import get_random_state, set_random_state
from saga_mm.registry import HOOKS


def draw():
    return [
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        random.random(),
        random.gauss(0, 1),
    ]


def test_random_state_survives_a_file(tmp_path):
    # This leaves the second number of a pair in the cache.
    np.random.randn()
    random.gauss(0, 1)
    torch.save({'w': torch.ones(1), 'state': get_random_state()}, tmp_path / 'a.pth')
    expected = draw()
    assert draw() != expected
    set_random_state(load_file(tmp_path / 'a.pth')['state'])
    assert draw() == expected


def runner(iteration, model=None, optim_wrapper=None):
    dataset = torch.zeros(4, 1)
    return SimpleNamespace(
        iter=iteration,
        seed=0,
        train_dataloader=torch.utils.data.DataLoader(dataset, batch_size=2),
        train_loop=None,
        cfg=Config(dict(load_from='a.pth')),
        model=model,
        optim_wrapper=optim_wrapper,
    )


@pytest.mark.parametrize(('iteration', 'restores'), [(0, False), (4, True)])
def test_weights_of_another_run_bring_no_random_state(iteration, restores):
    hook = HOOKS.build(dict(type='saga_mm.ExactResumeHook'))
    assert isinstance(hook, ExactResumeHook)
    checkpoint = {}
    hook.before_save_checkpoint(runner(iteration), checkpoint)
    expected = draw()
    hook.after_load_checkpoint(runner(iteration), checkpoint)
    hook.before_train(runner(iteration))
    hook.before_train_epoch(runner(iteration))
    assert (draw() == expected) is restores
    # The state is restored only once.
    hook.before_train_epoch(runner(iteration))
    assert draw() != expected


def test_validation_draws_its_own_numbers():
    hook = ExactResumeHook()
    before, inside = {}, {}
    hook.before_save_checkpoint(runner(1), before)
    hook.before_val(runner(1))
    expected = draw()
    hook.before_save_checkpoint(runner(1), inside)
    hook.after_val(runner(1))
    assert draw() == expected
    assert torch.equal(before['random_state'].pop('torch'), inside['random_state'].pop('torch'))
    assert before == inside


def check(checkpoint, **options):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    hook = HOOKS.build(dict(type='saga_mm.CheckpointCheckHook', **options))
    assert isinstance(hook, CheckpointCheckHook)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    hook.after_load_checkpoint(runner(0, model, wrapper), checkpoint(model.state_dict()))


def without(weights, name):
    return {key: weight for key, weight in weights.items() if key != name}


def test_checkpoints_that_fit_pass():
    check(lambda weights: {'state_dict': weights}, complete=True)
    check(lambda weights: without(weights, '1.num_batches_tracked'), complete=True)
    check(lambda weights: {**weights, 'head': torch.ones(1)}, complete=True)
    check(lambda weights: without(weights, '0.bias'), complete=False)
    rest = {'meta': {}, 'message_hub': {}, 'optimizer': {'param_groups': [{}]}}
    check(lambda weights: {'state_dict': weights, **rest}, complete=True, resume=True)


def test_checkpoints_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match=r'a\.pth does not fit .* 1 missing \(0\.bias\)'):
        check(lambda weights: without(weights, '0.bias'), complete=True)
    with pytest.raises(CheckpointError, match=r'1 mismatched \(0\.bias\)'):
        check(lambda weights: {**weights, '0.bias': torch.ones(9)}, complete=True)
    with pytest.raises(CheckpointError, match='0 loaded'):
        check(lambda weights: {'x': torch.ones(9)}, complete=False)
    with pytest.raises(CheckpointError, match=r'can not be resumed: .* no message_hub, optimizer;'):
        check(lambda weights: {'state_dict': weights, 'meta': {}}, complete=True, resume=True)
