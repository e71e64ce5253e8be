"""Formats results of the other modules as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection

from .plots import Results, in_order, matrix_kinds


def table(first: str, columns: Collection[str], rows: dict[str, list[str]]) -> str:
    """Format a table; the names of its rows are in a first column with the heading `first`."""
    lines = [f'| {first} | {" | ".join(columns)} |', '|---|' + '---|' * len(columns)]
    lines += [f'| {name} | {" | ".join(cells)} |' for name, cells in rows.items()]
    return '\n'.join(lines)


def make_rows(columns: Results, show: Callable[[dict], str]) -> dict[str, list[str]]:
    """The cells of each layer or stage, with a dash where a column has no entry."""
    return {
        name: [show(column[name]) if name in column else '-' for column in columns.values()]
        for name in in_order(columns)
    }


def rank_table(found: Results, states: bool) -> str:
    """A table of the ranks of all states or of all features, by layer."""
    columns = {
        f'{name}: {kind}': {
            layer: one['matrices'][kind]
            for layer, one in found[name].items()
            if kind in one['matrices']
        }
        for name, kind in matrix_kinds(found, states)
    }
    return table('layer', columns, make_rows(columns, _ranks))


def gate_table(found: Results) -> str:
    """A table of means and standard deviations of gates, by layer."""
    columns = {
        f'{name}: gate on {kind}': {
            layer: one['gates'][kind] for layer, one in layers.items() if one['gates']
        }
        for name, layers in found.items()
        for kind in 'kv'
        if any(one['gates'] for one in layers.values())
    }
    return table('layer', columns, make_rows(columns, '{0[0]:.2f}, {0[1]:.2f}'.format))


def token_table(found: Results) -> str:
    """A table of how many tokens a token attends to, by layer."""
    columns = {
        name: {layer: one['tokens'] for layer, one in layers.items()}
        for name, layers in found.items()
    }
    return table('layer', columns, make_rows(columns, '{0[0]:.1f} of {0[1]}'.format))


def _ranks(one: dict) -> str:
    return f'{one["effective_rank"]:.1f} / {one["numerical_rank"]:g} of {one["full_rank"]}'
