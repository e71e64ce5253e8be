"""Finds the weights in a checkpoint, under the names that they have without wrappers."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

# parts that `torch.compile` and model wrappers add to names
COMPILED = '_orig_mod'
WRAPPED = 'module'


def find_state_dict(checkpoint: Mapping) -> Mapping:
    """The part of a checkpoint that holds the weights: 'state_dict', 'model', or all of it."""
    for name in ('state_dict', 'model'):
        if isinstance(checkpoint.get(name), Mapping):
            return checkpoint[name]
    return checkpoint


def extract_state_dict(checkpoint: Mapping) -> OrderedDict[str, Tensor]:
    """The weights in a checkpoint, under the names that they have in a model without wrappers.

    They lose the '_orig_mod' of compiled modules wherever it is, and the 'module.' of wrappers at
    the start.
    """
    found = find_state_dict(checkpoint)
    weights = OrderedDict(
        (unwrapped(name), weight)
        for name, weight in found.items()
        if isinstance(name, str) and isinstance(weight, Tensor)
    )
    saved = {unwrapped(str(name)): value for name, value in versions(found).items()}
    return with_versions(weights, saved)


def select(weights: Mapping[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    """The weights whose names start with a prefix, such as 'backbone.', without it."""
    prefix = unwrapped(prefix.rstrip('.')) + '.'

    def below(named: Mapping[str, Any]) -> OrderedDict[str, Any]:
        return OrderedDict(
            (name[len(prefix) :], value) for name, value in named.items() if name.startswith(prefix)
        )

    return with_versions(below(weights), below(versions(weights)))


def versions(weights: Mapping) -> Mapping[str, Any]:
    """Versions of the modules that saved a state dict, by name, which torch keeps in it."""
    found = getattr(weights, '_metadata', None)
    return found if isinstance(found, Mapping) else {}


def with_versions(
    weights: OrderedDict[str, Tensor], found: Mapping[str, Any]
) -> OrderedDict[str, Tensor]:
    """Set the `versions` of a state dict, and return it."""
    vars(weights)['_metadata'] = found
    return weights


def unwrapped(name: str) -> str:
    """A name without '_orig_mod' and without 'module' at the start.

    Elsewhere, 'module' may be the name of a submodule.
    """
    parts = [part for part in name.split('.') if part != COMPILED]
    while parts[:1] == [WRAPPED]:
        del parts[0]
    return '.'.join(parts)


def plain_name(name: str) -> str:
    """A name without the parts of wrappers, wherever they are."""
    return '.'.join(part for part in name.split('.') if part not in (COMPILED, WRAPPED))


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The plain name of each name. Names whose plain names would be equal stay as they are."""
    plain = {name: plain_name(name) for name in names}
    number = Counter(plain.values())
    return {name: short if number[short] == 1 else name for name, short in plain.items()}
