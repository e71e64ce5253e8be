"""What the tools do, for use from Python."""

from .runs import test, train

__all__ = ['test', 'train']
