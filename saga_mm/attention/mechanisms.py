"""The linear attention mechanisms by name, to which a program can add its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from .decay import DecayLinearAttention
from .gated import GatedLinearAttention
from .wkv import WKVAttention

# Functions of the width and the number of heads.
LINEAR: dict[str, Callable[..., nn.Module]] = {
    # WKV mixes each channel by itself, so it has no heads.
    'wkv': lambda dim, num_heads, **options: WKVAttention(dim, **options),
    'gated': GatedLinearAttention,
    'plain': partial(GatedLinearAttention, gated=False),
    'decay': DecayLinearAttention,
}


def register_attention(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A decorator that names an attention mechanism for `SAGA(attention=NAME)` and
    `SoLAVision(linear=NAME)`.

    Args:
        name: A new name. The decorated class is called as `kind(dim, num_heads,
            lepe_kernel_size=..., feature_map=..., impl=...)`, with options of the backbone, and is
            usually a `PackedAttention`.

    Raises:
        ValueError: Another class has that name.

    Example: `docs/examples/focused_attention.py`.
    """

    def register(kind: type[nn.Module]) -> type[nn.Module]:
        known = LINEAR.get(name)
        # a module that is imported again defines its class anew
        if known is not None and _path(known) != _path(kind):
            raise ValueError(f'name must be a new one, got {name!r}, which is {_path(known)}')
        LINEAR[name] = kind
        return kind

    return register


def _path(kind: Callable) -> str:
    kind = getattr(kind, 'func', kind)
    return f'{kind.__module__}.{kind.__qualname__}'
