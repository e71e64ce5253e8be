"""Whether somebody watches a module, who would notice that it is not called."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_watched(module: nn.Module) -> bool:
    """Whether a module, or one inside it, has a hook or a replaced `forward`."""
    return _has_any_global_hook() or any(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or 'forward' in vars(part)
        for part in module.modules()
    )
