"""In which precision the eager implementations compute, whatever autocast says."""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec('P')
R = TypeVar('R')


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 input, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of a tensor; None where it is not enabled."""
    device = x.device.type
    # Devices without autocast, such as meta, refuse to be asked whether it is enabled. The compiler
    # of torch 2.11 can't trace the question whether a device has it.
    known = torch.compiler.is_dynamo_compiling() or torch.amp.is_autocast_available(device)
    if x.is_meta or not known or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def outside_autocast(
    function: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Switch autocast off while a function runs, on the device of its first argument."""

    @functools.wraps(function)
    def call(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        if autocast_dtype(x) is None:
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return call
