"""Keeps NaN and infinity out of the weights and the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..registry import HOOKS


@HOOKS.register_module()
class FiniteCheckHook(Hook):
    """Ends a training before NaN or infinity gets into the weights, or leaves such steps out.

    A loss of NaN has gradients of NaN, one step with them makes all weights NaN for good, and the
    checkpoints that follow replace those that were good. This hook looks at the gradients before
    each step, and at the weights before they are saved. With mixed precision it lets `GradScaler`
    leave out such steps.

    Args:
        skip (bool): Leave out a step whose gradients are not finite, where the training would end,
            and put back the statistics of batch norm from before it. Defaults to False.
        patience (int): End the training after so many iterations in a row that were left out.
            Defaults to 50.
    """

    def __init__(self, skip: bool = False, patience: int = 50) -> None:
        self.skip = skip
        self.patience = patience
        # iterations left out since the last step
        self.left_out = 0
        self.leaves_out = False
        self.accepted: set[str] = set()
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def before_train(self, runner: Runner) -> None:
        model = _unwrap(runner.model)
        # constants of a model may be infinite
        self.accepted = set(_not_finite(model.state_dict().items()))
        self._after_step(model)
        for wrapper in _wrappers(runner):
            # DeepSpeed's optimizers are none of torch's
            if isinstance(wrapper.optimizer, Optimizer):
                wrapper.optimizer.register_step_pre_hook(partial(self._before_step, runner))
                wrapper.optimizer.register_step_post_hook(partial(self._after_step, model))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict | None = None,
    ) -> None:
        loss = (outputs or {}).get('loss', 0.0)
        scaled = any(isinstance(wrapper, AmpOptimWrapper) for wrapper in _wrappers(runner))
        # GradScaler has left out this step
        if scaled and not math.isfinite(loss):
            self.left_out += 1
            self._put_back_buffers()
        if self.left_out >= self.patience:
            raise ValueError(
                f'iteration {runner.iter + 1}: loss or gradients were NaN or infinite in '
                f'{self.left_out} iterations in a row; the weights are from before'
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        names = _not_finite(checkpoint.get('state_dict', {}).items())
        if wrong := [name for name in names if name not in self.accepted]:
            raise ValueError(
                f'iteration {runner.iter + 1}: NaN or infinity in the weights ({_list(wrong)}): no '
                'checkpoint is written, and the last one stays; a lower learning rate may help'
            )

    def _before_step(self, runner: Runner, optimizer: Optimizer, *_: object) -> None:
        # GradScaler sets it for an optimizer that leaves out steps itself
        if getattr(optimizer, 'found_inf', None) is not None:
            return
        weights = [weight for group in optimizer.param_groups for weight in group['params']]
        finite = _all_finite([weight.grad for weight in weights if weight.grad is not None])
        if self.skip:
            # processes that hold parts of the gradients leave out the same steps
            all_reduce(finite, 'min')
        if finite:
            return
        model = _unwrap(runner.model)
        names = _not_finite((name, weight.grad) for name, weight in model.named_parameters())
        problem = f'iteration {runner.iter + 1}: NaN or infinity in the gradients ({_list(names)})'
        if not self.skip:
            raise ValueError(
                f'{problem}; the weights and the last checkpoint are from before. A lower learning '
                'rate, optim_wrapper.clip_grad or a longer warm-up may help; '
                "custom_hooks=[dict(type='saga_mm.FiniteCheckHook', skip=True)] leaves out such "
                'iterations'
            )
        print_log(f'{problem}: it is left out', 'current')
        self.leaves_out = True
        self.left_out += 1
        # an optimizer passes over weights without a gradient
        for weight in weights:
            weight.grad = None
        self._put_back_buffers()

    def _put_back_buffers(self) -> None:
        with torch.no_grad():
            for buffer, kept in self.buffers:
                buffer.copy_(kept)

    def _after_step(self, model: nn.Module, *_: object) -> None:
        if not self.leaves_out:
            self.left_out = 0
            if self.skip:
                self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.leaves_out = False


def _wrappers(runner: Runner) -> list[OptimWrapper]:
    wrapper = runner.optim_wrapper
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def _unwrap(model: nn.Module) -> nn.Module:
    return model.get_submodule('module') if is_model_wrapper(model) else model


def _all_finite(gradients: list[Tensor]) -> Tensor:
    """1 if there is no NaN and no infinity, else 0."""
    numbers = [_numbers(gradient) for gradient in gradients]
    largest = get_total_norm([values for values in numbers if values.numel()], norm_type=math.inf)
    return torch.isfinite(largest).float()


def _not_finite(tensors: Iterable[tuple[str, object]]) -> list[str]:
    return [
        name
        for name, value in tensors
        if isinstance(value, Tensor) and not torch.isfinite(_numbers(value)).all()
    ]


def _numbers(value: Tensor) -> Tensor:
    return value.coalesce().values() if value.is_sparse else value


def _list(names: list[str], number: int = 3) -> str:
    return ', '.join(names[:number]) + (f' and {len(names) - number} more' * (len(names) > number))
