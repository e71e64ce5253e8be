"""Writes tables, numbers and pictures. Files are written completely or not at all."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ..checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_text(path: str | Path, text: str) -> None:
    """Write a text, with a line break at its end."""
    write_atomically(path, f'{text}\n'.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, with tensors as lists."""
    write_text(path, json.dumps(value, default=Tensor.tolist))


def check_drawing() -> None:
    """ValueError without matplotlib, which is imported where a figure is made."""
    if find_spec('matplotlib') is None:
        raise ValueError('the pictures need matplotlib: pip install matplotlib')


def make_figure(width: float, height: float) -> Figure:
    """An empty figure, with its size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout='constrained')


def write_figure(path: str | Path, figure: Figure, dpi: int, colors: int | None = None) -> None:
    """Write a figure as PNG.

    Args:
        path: File of the picture.
        figure: The figure.
        dpi: Pixels per inch.
        colors: Number of colours that are kept, at most 256. Lines and maps of colours need no
            more, and take half of the bytes then. Defaults to None, which keeps all.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi)
    if colors is not None:
        from PIL import Image

        with Image.open(buffer) as picture:
            few = picture.convert('RGB').quantize(colors, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        few.save(buffer, format='png', optimize=True)
    write_atomically(path, buffer.getvalue())
