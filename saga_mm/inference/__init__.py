"""Runs the modules of a backbone over chunks of rows, where that saves memory or time."""

from .chunked import run_block, run_embed

__all__ = ['run_block', 'run_embed']
