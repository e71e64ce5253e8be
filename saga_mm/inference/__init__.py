"""Runs backbones and heads over chunks of rows, where that saves memory or time."""

from .chunked import is_watched, run_block, run_embed
from .live_bytes import LiveBytes
from .rows import NotByRowsError, RowProgram

__all__ = ['LiveBytes', 'NotByRowsError', 'RowProgram', 'is_watched', 'run_block', 'run_embed']
