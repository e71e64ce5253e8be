"""How a backbone runs its modules in inference: in chunks of rows where that pays."""

from .chunked import run_block, run_embed

__all__ = ['run_block', 'run_embed']
