"""What is found in a folder of data, and how it is told."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from ..checkpoint import make_folder, write_atomically
from .images import Loading, Look

Item = TypeVar('Item')
Result = TypeVar('Result')
# names of files in a message
SHOWN = 5


@dataclass(frozen=True)
class Survey:
    """What was found in a folder of data.

    Args:
        text: What to tell, some lines.
        config: The text of the config.
        files: What goes beside the config, by names.
    """

    text: str
    config: str
    files: Mapping[str, bytes]

    def write(self, out: Path, force: bool = False) -> list[Path]:
        """Write the config and what goes beside it.

        Args:
            out: The config.
            force: Whether files that exist are overwritten.

        Returns:
            The files.

        Raises:
            OSError: One of the files exists, or can't be written.
        """
        contents = {out.with_name(name): data for name, data in self.files.items()}
        contents[out] = self.config.encode()
        exist = [str(path) for path in contents if path.exists()]
        if exist and not force:
            raise FileExistsError(
                f'{", ".join(exist)} exists: choose another name with --out, or add --force'
            )
        make_folder(out.parent)
        for path, data in contents.items():
            write_atomically(path, data)
        return [out, *(path for path in contents if path != out)]


def look_at_all(look: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call a function for each item, in threads, with a bar on a terminal."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(look, items)
        return list(
            track(
                results,
                'looking at images',
                len(items),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        )


def tell_images(looks: Collection[Look], loading: Loading) -> list[str]:
    """Sizes, depth and channels of images, and the statistics of their values."""
    sizes = np.array([(look.width, look.height) for look in looks])
    different = len({tuple(size) for size in sizes})
    text = '{}x{}'.format(*np.median(sizes, 0).astype(int))
    if different > 1:
        low, high = ('{}x{}'.format(*limit) for limit in (sizes.min(0), sizes.max(0)))
        text = f'{different} sizes, median {text}, sides from {low} to {high}'
    kinds = Counter(f'{look.dtype} with {_channels(look)}' for look in looks)
    mean, std = (' '.join(f'{v:.4g}' for v in x) for x in (loading.mean, loading.std))
    order = ' (blue, green, red)' if loading.channels == 3 else ''
    return [
        f'sizes: {text} pixels',
        f'values: {", ".join(f"{kind} ({number})" for kind, number in kinds.most_common())}',
        f'loaded with {_number(loading.channels)}, mean{order} {mean}, standard deviation {std}',
    ]


def _channels(look: Look) -> str:
    return _number(look.channels) + (', the fourth constant' if look.is_opaque else '')


def _number(channels: int) -> str:
    return f'{channels} channel{"s" * (channels > 1)}'


def tell_problems(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """What is left out, and why."""
    return [
        f'left out: {len(names)} {reason}: {shorten(names)}'
        for reason, names in problems.items()
        if names
    ]


def title_of(root: Path) -> str:
    """The name of a folder, for a docstring."""
    return re.sub(r'[^\w .()-]', '_', root.name)


def shorten(names: Sequence[str]) -> str:
    """The first of some names."""
    more = f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
    return ', '.join(names[:SHOWN]) + more


def tell_table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Rows of a table, the first with its titles, in columns; the second column is left-aligned."""
    texts = [[str(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        '  '.join(
            cell.ljust(width) if i == 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]
