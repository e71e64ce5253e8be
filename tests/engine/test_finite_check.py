import importlib
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from torch import nn

from saga_mm.engine import FiniteCheckHook


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


def start(model, hook, optimizer=torch.optim.AdamW, wrap=OptimWrapper, **options):
    runner = SimpleNamespace(
        model=model, iter=0, optim_wrapper=wrap(optimizer(model.parameters(), lr=0.1, **options))
    )
    hook.before_train(runner)
    return runner


def weights(model):
    return [weight.clone() for weight in model.parameters()]


def step(runner, factor=1.0):
    loss = runner.model(torch.randn(4, 2)).sum() * factor
    runner.optim_wrapper.update_params(loss)


@pytest.mark.parametrize('value', [math.nan, math.inf])
@pytest.mark.parametrize('options', [{}, dict(fused=True), dict(foreach=False)])
def test_a_step_is_not_done(model, value, options):
    runner = start(model, FiniteCheckHook(), **options)
    step(runner)
    before = weights(model)
    with pytest.raises(ValueError, match=r'^iteration 1: NaN or infinity in the gradients \(0\.'):
        step(runner, value)
    assert all(map(torch.equal, weights(model), before))


def test_names_of_some_weights(model):
    runner = start(model, FiniteCheckHook())
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    model[2].bias.grad[0] = math.nan
    with pytest.raises(ValueError, match=r'in the gradients \(2\.bias\);'):
        runner.optim_wrapper.step()


def test_left_out_steps_change_nothing(model):
    hook = FiniteCheckHook(skip=True)
    runner = start(model, hook)
    step(runner)
    before, state = weights(model), {k: v.clone() for k, v in model.state_dict().items()}
    moments = runner.optim_wrapper.optimizer.state[model[0].weight]['exp_avg'].clone()
    step(runner, math.nan)
    assert hook.left_out == 1
    assert all(map(torch.equal, weights(model), before))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(runner.optim_wrapper.optimizer.state[model[0].weight]['exp_avg'], moments)
    step(runner)
    assert hook.left_out == 0
    assert not torch.equal(model[0].weight, before[0])


# An optimizer that gets the scale checks the gradients itself.
@pytest.mark.parametrize('fused', [False, True])
def test_steps_of_mixed_precision_are_left_to_its_scaler(model, fused):
    runner = start(model, FiniteCheckHook(), fused=fused)
    optimizer = runner.optim_wrapper.optimizer
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    before = weights(model)
    scaler.scale(model(torch.randn(4, 2)).sum() * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2
    assert all(map(torch.equal, weights(model), before))


@pytest.fixture
def scaling_wrapper(monkeypatch):
    """mmengine's wrapper of mixed precision, which asks for a GPU, with the scaler of the CPU."""
    module = importlib.import_module(AmpOptimWrapper.__module__)
    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(module, 'GradScaler', partial(torch.amp.GradScaler, 'cpu', init_scale=4.0))
    return lambda optimizer: AmpOptimWrapper(optimizer=optimizer)


def iterate(runner, hook, factor=1.0):
    loss = runner.model(torch.randn(4, 2) * factor).sum()
    runner.optim_wrapper.update_params(loss)
    hook.after_train_iter(runner, 0, outputs=dict(loss=loss.item()))


@pytest.mark.parametrize('skip', [False, True])
def test_iterations_that_the_scaler_leaves_out(model, scaling_wrapper, skip):
    hook = FiniteCheckHook(skip=skip, patience=2)
    runner = start(model, hook, wrap=scaling_wrapper)
    iterate(runner, hook)
    before, state = weights(model), {k: v.clone() for k, v in model.state_dict().items()}
    iterate(runner, hook, math.nan)
    assert hook.left_out == 1
    assert all(map(torch.equal, weights(model), before))
    if skip:
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        hook.before_save_checkpoint(runner, dict(state_dict=model.state_dict()))
    else:
        with pytest.raises(ValueError, match=r'in the weights \(1\.running_mean'):
            hook.before_save_checkpoint(runner, dict(state_dict=model.state_dict()))
    iterate(runner, hook)
    assert hook.left_out == 0
    assert not torch.equal(model[0].weight, before[0])
    iterate(runner, hook, math.nan)
    with pytest.raises(ValueError, match='in 2 iterations in a row; the weights are from before'):
        iterate(runner, hook, math.nan)


def test_several_optimizers_are_checked(model):
    def wrap(optimizer):
        return OptimWrapperDict(a=OptimWrapper(optimizer))

    runner = start(model, FiniteCheckHook(), wrap=wrap)
    model(torch.randn(4, 2)).sum().mul(math.nan).backward()
    with pytest.raises(ValueError, match='NaN or infinity in the gradients'):
        runner.optim_wrapper['a'].step()


def test_gradients_without_numbers_pass():
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(0))
    model.rows = nn.Embedding(4, 2, sparse=True)
    model.unused = nn.Parameter(torch.ones(1))
    runner = start(model, FiniteCheckHook(), optimizer=torch.optim.SGD)
    (model.rows(torch.tensor([1])).sum() + model.empty.sum()).backward()
    runner.optim_wrapper.step()
    (model.rows(torch.tensor([1])).sum() * math.nan).backward()
    with pytest.raises(ValueError, match=r'in the gradients \(rows\.weight\)'):
        runner.optim_wrapper.step()


def test_what_was_infinite_from_the_start_is_saved(model):
    model.register_buffer('mask', torch.tensor([0, -math.inf]))
    hook = FiniteCheckHook()
    runner = start(model, hook)
    checkpoint = dict(state_dict=model.state_dict())
    hook.before_save_checkpoint(runner, checkpoint)
    model[1].running_var[0] = math.nan
    with pytest.raises(ValueError, match=r'in the weights \(1\.running_var\): no checkpoint is'):
        hook.before_save_checkpoint(runner, checkpoint)
