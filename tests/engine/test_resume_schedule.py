from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import (
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    OptimWrapper,
    PolyLR,
    ReduceOnPlateauLR,
)
from mmengine.optim.scheduler import CosineRestartLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from saga_mm.engine import ResumeScheduleHook, resume_schedule

LENGTH = 5


def optimizer():
    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [dict(params=weights[:1], lr=1.0), dict(params=weights[1:], lr=0.1)]
    return OptimWrapper(torch.optim.SGD(groups, lr=1.0, momentum=0.9))


class Run:
    """The parts of a runner that the hook uses, trained by iterations or by epochs."""

    def __init__(self, make, end, by_epoch=False):
        self.optim_wrapper = optimizer()
        self.param_schedulers = make(self.optim_wrapper, end)
        self.by_epoch = by_epoch
        self.train_loop = (EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop).__new__(
            EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
        )
        self.train_dataloader = [None] * LENGTH
        self.iter = self.epoch = 0

    def train(self, iterations):
        """Step the schedulers as ParamSchedulerHook does, and return the rate of each iteration."""
        rates = []
        for _ in range(iterations):
            rates.append([group['lr'] for group in self.optim_wrapper.param_groups])
            self.iter += 1
            self.step(by_epoch=False)
            if self.by_epoch and self.iter % LENGTH == 0:
                self.epoch += 1
                self.step(by_epoch=True)
        return torch.tensor(rates)

    def step(self, by_epoch):
        for scheduler in self.param_schedulers:
            if scheduler.by_epoch is by_epoch:
                scheduler.step()

    def resume(self, other):
        """Load the state as Runner.resume does."""
        hook = ResumeScheduleHook()
        state = [scheduler.state_dict() for scheduler in other.param_schedulers]
        hook.after_load_checkpoint(self, dict(param_schedulers=state))
        self.iter, self.epoch = other.iter, other.epoch
        self.optim_wrapper.load_state_dict(other.optim_wrapper.state_dict())
        for scheduler, saved in zip(self.param_schedulers, state, strict=False):
            scheduler.load_state_dict(saved)
        hook.before_train(self)
        return self


def warm_up(optim, end):
    return [LinearLR(optim, 0.1, begin=0, end=3, by_epoch=False)]


SCHEDULES = {
    'poly': lambda optim, end: [*warm_up(optim, end), PolyLR(optim, end=end, by_epoch=False)],
    'one cycle': lambda optim, end: [OneCycleLR(optim, 1.0, total_steps=end, by_epoch=False)],
    'steps': lambda optim, end: [MultiStepLR(optim, [end // 2, end - 2], by_epoch=False)],
    'restarts': lambda optim, end: [
        CosineRestartLR(optim, [end // 2, end - end // 2], [1, 0.5], eta_min=0.01, by_epoch=False)
    ],
    'one more': lambda optim, end: [
        *warm_up(optim, end),
        *([PolyLR(optim, end=end, by_epoch=False)] if end > 10 else []),
    ],
}


@pytest.mark.parametrize('name', SCHEDULES)
def test_rates_are_those_of_the_longer_schedule(name):
    make = SCHEDULES[name]
    expected = Run(make, 24).train(24)
    first = Run(make, 10)
    first.train(10)
    torch.testing.assert_close(Run(make, 24).resume(first).train(14), expected[10:])


@pytest.mark.parametrize('end', [10, 24])
@pytest.mark.parametrize('name', SCHEDULES)
def test_rates_are_those_of_another_start(name, end):
    def lower(optim, end):
        for group in optim.param_groups:
            group['lr'] *= 0.1
        if name == 'one cycle':
            return [OneCycleLR(optim, 0.1, total_steps=end, by_epoch=False)]
        return SCHEDULES[name](optim, end)

    expected = Run(lower, end).train(end)
    first = Run(SCHEDULES[name], 10)
    first.train(4)
    torch.testing.assert_close(Run(lower, end).resume(first).train(end - 4), expected[4:])


def test_epochs_are_counted_as_they_are_now():
    def make(optim, end):
        return [*warm_up(optim, end), PolyLR(optim, end=end, by_epoch=True)]

    expected = Run(make, 4, by_epoch=True).train(4 * LENGTH)
    first = Run(make, 2, by_epoch=True)
    first.train(2 * LENGTH)
    resumed = Run(make, 4, by_epoch=True).resume(first)
    torch.testing.assert_close(resumed.train(2 * LENGTH), expected[2 * LENGTH :])


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_same_schedule_goes_on_as_restored(name):
    make = SCHEDULES[name]
    expected = Run(make, 24).train(24)
    first = Run(make, 24)
    first.train(10)
    # No schedule gives this rate.
    for group in first.optim_wrapper.param_groups:
        group['lr'] *= 2
    resumed = Run(make, 24).resume(first)
    assert torch.equal(resumed.train(1)[0], 2 * expected[10])


def test_schedules_by_metrics_stay(monkeypatch):
    said = []
    monkeypatch.setattr(resume_schedule, 'print_log', lambda line, *_: said.append(line))

    def make(optim, end):
        return [ReduceOnPlateauLR(optim, monitor='a', patience=0, end=end), *warm_up(optim, end)]

    first = Run(make, 10)
    first.train(6)
    for group in first.optim_wrapper.param_groups:
        group['lr'] *= 0.5
    before = first.train(1)
    first.iter -= 1
    assert torch.equal(Run(make, 20).resume(first).train(1), before)
    assert 'whose schedule is kept' in said[0]


def test_weights_of_another_training_bring_no_schedule():
    make = SCHEDULES['poly']
    first = Run(make, 10)
    first.train(10)
    hook, runner = ResumeScheduleHook(), Run(make, 24)
    hook.after_load_checkpoint(runner, dict(param_schedulers=[]))
    hook.before_train(runner)
    assert torch.equal(runner.train(24), Run(make, 24).train(24))
    # A test run has no schedulers.
    hook.after_load_checkpoint(SimpleNamespace(param_schedulers=None), {})
