"""Runs backbones and heads over chunks of rows, where that saves memory or time."""

from .chunked import is_watched, run_block, run_embed, run_output
from .image_rows import ImageRows
from .live_bytes import LiveBytes
from .rows import NotByRowsError, RowProgram
from .storage import bytes_in_memory, chosen_storage, in_full, store_maps

__all__ = [
    'ImageRows',
    'LiveBytes',
    'NotByRowsError',
    'RowProgram',
    'bytes_in_memory',
    'chosen_storage',
    'in_full',
    'is_watched',
    'run_block',
    'run_embed',
    'run_output',
    'store_maps',
]
