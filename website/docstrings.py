"""Rewrites the formulas of docstrings, which are in reStructuredText, for Markdown."""

from __future__ import annotations

import re
from textwrap import dedent
from typing import Any

import griffe

INLINE = re.compile(r':math:`(.*?)`', re.DOTALL)
BLOCK = re.compile(r'^( *)\.\. math::\n((?:\1 +\S.*\n?|\n(?=\1 ))+)', re.MULTILINE)


class Formulas(griffe.Extension):
    """Replaces the role and the directive `math` by the delimiters of LaTeX."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    text = INLINE.sub(r'\\(\1\\)', text)
    return BLOCK.sub(lambda match: f'\\[\n{dedent(match[2]).strip()}\n\\]\n', text)
