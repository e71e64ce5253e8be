"""The precision that references compute in is theirs to choose."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def outside_autocast(function: Callable) -> Callable:
    """Switch autocast off while a function runs, on the device of its first argument."""

    @functools.wraps(function)
    def call(x: Tensor, *args, **kwargs):
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return function(x, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(x, *args, **kwargs)

    return call
