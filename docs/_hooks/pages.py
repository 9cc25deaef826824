"""What mkdocs runs while it builds: pages from elsewhere in the repository, links, formulas, plots and tables."""

from __future__ import annotations

import html
import importlib.util
import logging
import posixpath
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files of the repository that are pages of the site."""

# A child of mkdocs' logger: what it warns of fails a strict build.
log = logging.getLogger("mkdocs.plugins.pages")

_FENCED = re.compile(r"(?ms)^(```+|~~~+).*?^\1[ \t]*$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_MATH = re.compile(r'(?s)<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>')


def _beside(name: str) -> ModuleType:
    """Another module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that lie elsewhere and the plots."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for name, picture in _beside("plots").pictures().items():
        files.append(File.generated(config, f"ops/{name}.svg", content=picture))
    return files


def _source(page: str) -> str:
    """Where a page lies in the repository."""
    return {v: k for k, v in ELSEWHERE.items()}.get(page, f"docs/{page}")


def rewritten(markdown: str, page: str) -> str:
    """Links as the site needs them: they are written for the repository, where they lead to any file.

    A file that is no page of the site is named and not linked, since the site does not know where the repository is
    published. One that does not exist is warned of, which fails a strict build.
    """

    def link(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(_source(page)), path))
        if inside in ELSEWHERE:
            inside = f"docs/{ELSEWHERE[inside]}"
        elif inside.startswith("docs/"):
            pass
        elif (ROOT / inside).exists():
            return text
        else:
            log.warning(f"{_source(page)} links to {target}, which is not there")
            return match[0]
        there = posixpath.relpath(inside.removeprefix("docs/"), posixpath.dirname(page) or ".")
        return f"{picture}[{text}]({there}{hash_}{anchor})"

    parts, end = [], 0
    for fence in _FENCED.finditer(markdown):
        parts += [_LINK.sub(link, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(link, markdown[end:])])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill in tables and listings, then make the links those of the site."""
    return rewritten(_beside("tables").filled(markdown), page.file.src_uri)


def _mathml(match: re.Match[str]) -> str:
    block = match[2] == "["
    formula = latex2mathml.converter.convert(html.unescape(match[3]).strip(), display="block" if block else "inline")
    # MathML Core, which browsers have, leaves the alignment of columns to CSS.
    formula = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', formula)
    return f'<div class="formula" tabindex="0">{formula}</div>' if block else formula


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers lay out themselves: no script, no font, no request."""
    return _MATH.sub(_mathml, content)
