"""Runs backbones and heads over chunks of rows, where that saves memory or time."""

from .chunked import is_watched, run_block, run_embed, run_output
from .disk import bytes_in_memory, maps_on_disk
from .image_rows import ImageRows
from .live_bytes import LiveBytes
from .rows import NotByRowsError, RowProgram

__all__ = [
    'ImageRows',
    'LiveBytes',
    'NotByRowsError',
    'RowProgram',
    'bytes_in_memory',
    'is_watched',
    'maps_on_disk',
    'run_block',
    'run_embed',
    'run_output',
]
