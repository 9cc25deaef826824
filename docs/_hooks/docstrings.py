"""Docstrings as Markdown: the few reStructuredText forms that they are written with."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

_DOCUMENTED = re.compile(r"(?m)^::: ([\w.]+)$")
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?([\w.]+)`")


@cache
def _documented() -> dict[str, str]:
    """The last parts of the names that some page documents, to the names in full."""
    pages = Path(__file__).parents[1].rglob("*.md")
    return {name.rpartition(".")[2]: name for page in pages for name in _DOCUMENTED.findall(page.read_text())}


def _linked(match: re.Match[str]) -> str:
    name = match[1].rpartition(".")[2]
    target = _documented().get(name)
    return f"[`{name}`][{target}]" if target else f"`{match[1]}`"


def markdown(text: str) -> str:
    """The docstring with its cross references as links and ``::`` before an indented block as a colon or nothing."""
    text = _ROLE.sub(_linked, text)
    text = re.sub(r"(?m)^[ ]*::$\n", "", text)
    text = re.sub(r"(?m)(\S)::$", r"\1:", text)
    return text.replace("``", "`")


class Markdown(griffe.Extension):
    """What mkdocstrings calls for each object that it reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
