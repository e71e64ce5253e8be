"""Refuses checkpoints that do not fit."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

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
    """

    priority = 'VERY_LOW'

    def __init__(self, complete: bool, resume: bool = False) -> None:
        self.complete = complete
        self.resume = resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        file = _name(runner)
        if self.resume:
            if missing := missing_for_resume(checkpoint):
                raise CheckpointError(
                    f'{file} can not be resumed: it holds weights, but no {", ".join(missing)}; '
                    'to start a new training from it, set load_from'
                )
            check_training_state(checkpoint, file)
            state = checkpoint['optimizer']
            for name, wrapper in _wrappers(runner):
                check_groups(wrapper.optimizer, state[name] if name else state, file)
            remove_configs(checkpoint)
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        match = load_model_weights(model, checkpoint, file, complete=self.complete)
        print_log(f'{file}, weights: {match}', 'current')
        # mmengine loads this next, which changes nothing
        checkpoint['state_dict'] = model.state_dict()

    def before_train(self, runner: Runner) -> None:
        if not self.resume:
            return
        for _, wrapper in _wrappers(runner):
            check_fused_state(wrapper.optimizer, _name(runner))


def _wrappers(runner: Runner) -> list[tuple[str, OptimWrapper]]:
    """The optimizers of a training by name; a single one has none."""
    wrappers = runner.optim_wrapper
    return list(wrappers.items()) if isinstance(wrappers, OptimWrapperDict) else [('', wrappers)]


def _name(runner: Runner) -> str:
    return runner.cfg.get('load_from') or 'the latest checkpoint'
