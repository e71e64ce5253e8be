"""Suggests the known name that a mistyped one is nearest to."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Iterable, Iterator, Sequence

from mmengine.registry import Registry


def suggest(name: str, known: Iterable[str]) -> str:
    """A question to append to an error, or '' if no known name is near."""
    return _ask(_near(name, [other for other in known if other != name]))


def suggest_option(parser: argparse.ArgumentParser, message: str) -> str:
    """A question to append to argparse's error about an unknown option."""
    _, found, unknown = message.partition('unrecognized arguments: ')
    options = [option.partition('=')[0] for option in unknown.split() if option.startswith('--')]
    return suggest(options[0], _options(parser)) if found and options else ''


def suggest_type(name: str, registry: Registry) -> str:
    """A question to append to an error about a name that a registry and its parents don't have.

    Names of other scopes are found without theirs as well: `SAGA` suggests `saga_mm.SAGA`.
    """
    names: list[str] = []
    level: Registry | None = registry
    while level is not None:
        names += level.module_dict
        for scope, child in level.children.items():
            names += [f'{scope}.{known}' for known in child.module_dict]
        level = level.parent
    # of equal names without their scope, the first
    scoped = {known.rpartition('.')[2]: known for known in reversed(names)}
    bare = name.rpartition('.')[2]
    found = [scoped[bare]] if bare in scoped else _near(name, names)
    return _ask(found or [scoped[near] for near in _near(bare, scoped)])


def suggest_argument(name: str, kind: object) -> str:
    """A question to append to an error about an argument that a class does not take."""
    makers = [vars(base).get('__init__') for base in getattr(kind, '__mro__', ())]
    return suggest(
        name,
        [
            key
            for maker in makers
            if inspect.isfunction(maker)
            for key in inspect.signature(maker).parameters
        ],
    )


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(known), 1, 0.7)


def _ask(near: Sequence[str]) -> str:
    return f'; did you mean {near[0]!r}?' if near else ''


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The options of a parser and of its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
