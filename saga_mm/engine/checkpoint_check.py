"""Refuses checkpoints that do not fit."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from ..checkpoint import (
    CheckpointError,
    extract_state_dict,
    match_weights,
    missing_for_resume,
    translate,
)
from ..registry import HOOKS


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Refuses a checkpoint that does not fit the model, where mmengine only warns.

    Args:
        complete (bool): Each weight of the model must be in the file, with its shape, as for tests
            and for a resume. Else one is enough, as for training that starts from other weights.
        resume (bool): The file must also hold what a resume needs.
    """

    def __init__(self, complete: bool, resume: bool = False) -> None:
        self.complete = complete
        self.resume = resume

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        file = runner.cfg.get('load_from') or 'the latest checkpoint'
        if self.resume and (missing := missing_for_resume(checkpoint)):
            raise CheckpointError(
                f'{file} can not be resumed: it holds weights, but no {", ".join(missing)}; '
                'to start a new training from it, set load_from'
            )
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        match = match_weights(model, translate(model, extract_state_dict(checkpoint)))
        if not match.loaded or (self.complete and (match.missing or match.mismatched)):
            raise CheckpointError(f'{file} does not fit the model of the config, weights: {match}')
        print_log(f'{file}, weights: {match}', 'current')
