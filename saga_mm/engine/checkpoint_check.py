"""Refuses checkpoints that do not fit."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch.optim import Optimizer

from ..checkpoint import (
    CheckpointError,
    check_fused_state,
    check_groups,
    check_training_state,
    load_model_weights,
    missing_for_resume,
    remove_configs,
)
from ..registry import HOOKS


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Loads the weights of a checkpoint, and refuses one that does not fit, where mmengine warns.

    It runs after the other hooks, which may change the checkpoint.

    Args:
        complete (bool): Each weight of the model must be in the file, with its shape, as for tests
            and for a resume. Otherwise one is enough, as for a training that starts from the
            weights of another model.
        resume (bool): The file must also hold the state that a resume needs, with the right types
            and ranges. Defaults to False.
        optional (str): Weights whose names start with this may be missing. Defaults to none.
    """

    priority = 'VERY_LOW'

    def __init__(self, complete: bool, resume: bool = False, optional: str = '') -> None:
        self.complete = complete
        self.resume = resume
        self.optional = optional

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        file = _name(runner)
        if self.resume:
            if missing := missing_for_resume(checkpoint):
                raise CheckpointError(
                    f'{file} can not be resumed: it holds weights, but no {", ".join(missing)}; '
                    'to start a new training from it, set load_from'
                )
            check_training_state(checkpoint, file)
            check_groups(_optimizers(runner), checkpoint['optimizer'], file)
            remove_configs(checkpoint)
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        match = load_model_weights(
            model, checkpoint, file, complete=self.complete, optional=self.optional
        )
        print_log(f'{file}, weights: {match}', 'current')
        # mmengine loads this next, which changes nothing
        checkpoint['state_dict'] = model.state_dict()

    def before_train(self, runner: Runner) -> None:
        if not self.resume:
            return
        for optimizer in _optimizers(runner).values():
            check_fused_state(optimizer, _name(runner))


def _optimizers(runner: Runner) -> dict[str, Optimizer]:
    """The optimizers of a training by name; the name of a single one is empty."""
    wrappers = runner.optim_wrapper
    named = wrappers if isinstance(wrappers, OptimWrapperDict) else {'': wrappers}
    return {name: wrapper.optimizer for name, wrapper in named.items()}


def _name(runner: Runner) -> str:
    return runner.cfg.get('load_from') or 'the latest checkpoint'
