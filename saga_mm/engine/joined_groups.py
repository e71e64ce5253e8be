"""One group of the optimizer for all parameters with equal settings."""

from __future__ import annotations

from collections.abc import Iterable

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class JoinedGroupsOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor of optimizers, with few groups of parameters.

    With `paramwise_cfg`, mmengine makes a group of each parameter. PyTorch updates the parameters
    of a group together, and one group after the other, so that on a GPU many groups take many
    launches. Here, parameters with equal settings are a group. They are updated as they would be in
    groups of their own.

    Args:
        optim_wrapper_cfg (dict): As in mmengine's `DefaultOptimWrapperConstructor`.
        paramwise_cfg (dict, optional): Likewise.

    Raises:
        ValueError: A parameter comes up twice, as torch would say of two groups.
    """

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Append the groups of a module and of its children; mmengine calls it for each of them."""
        super().add_params(params, module, prefix, is_dcn_module)
        if not prefix:
            params[:] = join_groups(params)


def join_groups(groups: Iterable[dict]) -> list[dict]:
    """Groups of parameters, each with settings of its own, in the order in which they come up.

    Raises:
        ValueError: A parameter is in two groups.
    """
    joined: dict[str, dict] = {}
    seen: set[nn.Parameter] = set()
    for group in groups:
        if not seen.isdisjoint(group['params']):
            shape = tuple(group['params'][0].shape)
            raise ValueError(
                'paramwise_cfg.bypass_duplicate must be True if modules of the model share '
                f'parameters, as they do one of shape {shape}'
            )
        seen.update(group['params'])
        settings = {name: value for name, value in group.items() if name != 'params'}
        same = joined.setdefault(repr(sorted(settings.items())), {'params': [], **settings})
        same['params'] += group['params']
    return list(joined.values())
