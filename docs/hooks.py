"""Functions that mkdocs calls while it builds the site; mkdocs.yml names this file."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository."""

_MATH = re.compile(r'(?s)<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?([\w.]+)</code>")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Change links to and from the pages of ``PAGES`` to their paths on the site."""
    if page.file.src_uri in PAGES:
        markdown = markdown.replace("](docs/", "](")
    for target, source in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}").replace(f"]({source}", f"]({target}")
    return markdown


def _mathml(match: re.Match[str]) -> str:
    block = match[2] == "["
    formula = latex2mathml.converter.convert(html.unescape(match[3]).strip(), display="block" if block else "inline")
    # Browsers implement MathML Core, in which CSS aligns columns.
    formula = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', formula)
    return f'<div class="formula" tabindex="0">{formula}</div>' if block else formula


def on_page_content(content: str, **_: Any) -> str:
    """Write formulas as MathML, which needs no script, and Sphinx roles of docstrings, such as ``:func:``, as code."""
    return _ROLE.sub(r"<code>\1</code>", _MATH.sub(_mathml, content))
