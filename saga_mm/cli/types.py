"""The classes behind the `type` entries of a config."""

from __future__ import annotations

from collections.abc import Iterator

from mmengine.registry import Registry

# what looking up a name may raise: modules that can't be imported, and names that lead nowhere
UNRESOLVABLE = (AttributeError, ImportError, KeyError, TypeError, ValueError)


def resolve(kind: object, registry: Registry, scope: str | None) -> type | None:
    """The class that a `type` entry stands for: itself, or what its name leads to.

    Args:
        kind: A class, a name such as 'mmseg.ADE20KDataset', or anything else.
        registry: mmengine's registry of such classes.
        scope: Where names are looked up, the `default_scope` of a config.

    Returns:
        The class, or None where there is none.
    """
    if isinstance(kind, type):
        return kind
    if not isinstance(kind, str):
        return None
    try:
        with registry.switch_scope_and_registry(scope) as scoped:
            found = scoped.get(kind)
    except UNRESOLVABLE:
        return None
    return found if isinstance(found, type) else None


def name_of(kind: object) -> str:
    """What to call a `type` entry."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


def find_datasets(dataset: object, key: str = 'dataset') -> Iterator[tuple[str, dict]]:
    """The data sets of a dataloader, out of their wrappers, with their dotted names."""
    if isinstance(dataset, (list, tuple)):
        for i, item in enumerate(dataset):
            yield from find_datasets(item, f'{key}.{i}')
    elif isinstance(dataset, dict):
        inner = [name for name in ('dataset', 'datasets') if name in dataset]
        for name in inner:
            yield from find_datasets(dataset[name], f'{key}.{name}')
        if not inner:
            yield key, dataset
