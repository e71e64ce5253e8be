"""Measures what models cost, and analyses their attention."""
