"""Writes tables, numbers and pictures. Files are written completely or not at all."""

from __future__ import annotations

import io
import json
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from ..checkpoint import write_atomically


def write_text(path: str | Path, text: str) -> None:
    """Write a text, with a line break at its end."""
    write_atomically(path, f'{text}\n'.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, with tensors as lists."""
    write_text(path, json.dumps(value, default=Tensor.tolist))


def write_figure(path: str | Path, figure: Figure, dpi: int) -> None:
    """Write a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=dpi)
    write_atomically(path, buffer.getvalue())
