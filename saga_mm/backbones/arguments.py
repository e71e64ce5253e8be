"""Checks the arguments of a backbone, which come from configs, against its annotations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

# what the annotations of backbones name: in words, and the classes of values
KINDS = {
    bool: ('True or False', bool),
    int: ('an int', Integral),
    float: ('a number', Real),
    str: ('a string', str),
    dict: ('a dict', Mapping),
    list: ('a list', list),
    NoneType: ('None', NoneType),
}


def check_arguments(kind: type, args: Sequence, kwargs: Mapping[str, Any]) -> None:
    """Check what a class of this package is called with, before it is used.

    A class of others may have an `__init__` whose annotations are not meant for that.

    An annotation with other types than those of `KINDS` allows everything, as a class checks its
    sequences itself, and so does a missing one. What a class does not take is left to Python.

    Args:
        kind: The class.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        ValueError: An argument is not of an annotated type.
    """
    init = kind.__init__  # type: ignore[misc]
    if init.__module__.partition('.')[0] != __name__.partition('.')[0]:
        return
    hints = get_type_hints(init)
    names = list(inspect.signature(kind).parameters)
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        allowed = _alternatives(hints.get(name, Any))
        if not allowed <= KINDS.keys() or any(_is(value, one) for one in allowed):
            continue
        words = dict.fromkeys(text for one, (text, _) in KINDS.items() if one in allowed)
        raise ValueError(f'{name} must be {" or ".join(words)}, got {value!r}')


def _alternatives(hint: Any) -> set[Any]:
    """The types of an annotation, without the types of their elements."""
    if get_origin(hint) in (Union, UnionType):
        return set().union(*map(_alternatives, get_args(hint)))
    return {get_origin(hint) or hint}


def _is(value: object, kind: type) -> bool:
    if kind is bool and isinstance(value, Integral):  # 0 and 1 are common in configs
        return value in (0, 1)
    return isinstance(value, KINDS[kind][1])
