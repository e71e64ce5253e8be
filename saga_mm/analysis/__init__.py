"""Measures what models cost, and analyses their attention."""

from .mixing import Mixing, explain

__all__ = ['Mixing', 'explain']
