"""Every Python block of the documentation runs, and every ``dfkd-fast`` command parses.

A block that cannot run in a test is preceded by ``<!-- no-run: reason -->``; it is only compiled.
"""

from __future__ import annotations

import re
import shlex
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

import dfkd_fast
from dfkd_fast import cli, ops
from dfkd_fast.benchmarks.report import coverage_tables
from dfkd_fast.engine import engines

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"(?m)^(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<code>(?s:.*?))^(?P=ticks)[ \t]*$")
_MARK = re.compile(r"<!-- no-run:(.*?)-->\s*\Z", re.DOTALL)


class Block(NamedTuple):
    """A fenced block: language, number of its first line, text, and the reason why it is not run, if any."""

    language: str
    line: int
    code: str
    not_run: str | None


def blocks(text: str) -> list[Block]:
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        mark = _MARK.search(before)
        language = (fence["info"].split() or [""])[0]
        found.append(Block(language, before.count("\n") + 2, fence["code"], mark and mark[1].strip()))
    return found


def of(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language in languages]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[str]:
    """The ``dfkd-fast`` command lines in fenced and indented code."""
    text = page.read_text()
    code = "".join(block.code for block in blocks(text) if block.language not in ("python", "yaml"))
    code += "\n".join(re.findall(r"(?m)^    (.*)$", _FENCE.sub("", text)))
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.startswith(("dfkd-fast ", ".venv/bin/dfkd-fast "))]


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's run downloads weights and takes days: replace it by one round on random weights."""
    import timm

    create, distill = timm.create_model, dfkd_fast.distill

    def without_download(*args, pretrained=False, **kwargs):
        return create(*args, **kwargs)

    def one_round(teacher, student, config, **more):
        loop = replace(config.loop, epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1, batch_size=2)
        return distill(teacher, student, replace(config, image_size=32, loop=loop), **more)

    monkeypatch.setattr(timm, "create_model", without_download)
    monkeypatch.setattr(dfkd_fast, "distill", one_round)


def run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page's blocks in order, as one module, with the eager engine."""
    monkeypatch.setattr(engines, "resolve_engine", lambda name, runtime: "eager")
    module = types.ModuleType("__docs__")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in of(page, "python"):
        # The empty lines make tracebacks show the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
        if block.not_run is None:
            exec(code, module.__dict__)
        else:
            assert len(block.not_run.split()) >= 2, f"{name(page)}:{block.line} is not run and has no reason"


@pytest.mark.parametrize("page", [page for page in PAGES if of(page, "python")], ids=name)
def test_python_runs(page, monkeypatch, request):
    if page.name == "README.md":
        request.getfixturevalue("_small")
    run(page, monkeypatch)


def test_skipped_block_needs_a_reason_and_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: needs a GPU -->\n```python\nraise SystemError\n```\n")
    run(page, monkeypatch)
    page.write_text("<!-- no-run: -->\n```python\nraise SystemError\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:3 is not run"):
        run(page, monkeypatch)
    page.write_text("<!-- no-run: needs a GPU -->\n\n```python\nraise raise\n```\n")
    with pytest.raises(SyntaxError):
        run(page, monkeypatch)
    page.write_text("```python\nraise SystemError\n```\n")
    with pytest.raises(SystemError):
        run(page, monkeypatch)


def test_blocks_have_a_known_language():
    unknown = {
        f"{name(page)}:{block.line}": block.language
        for page in PAGES
        for block in blocks(page.read_text())
        if block.language not in ("", "python", "bash", "yaml", "toml", "math")
        and not (page.name == "CONTRIBUTING.md" and block.language == "diff")  # test_contributing.py runs them
    }
    assert not unknown, "blocks of these languages are not checked"


@pytest.fixture(scope="module")
def parser():
    pytest.importorskip("jsonargparse")
    return cli.create_parser()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_parse(page, parser):
    for block in of(page, "yaml"):  # the page's commands may use its configs
        if file := re.match(r"# ([\w-]+\.yaml)\n", block.code):
            Path(file[1]).write_text(block.code)
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        parser.parse_args(words)


def test_wrong_command_fails(parser):
    with pytest.raises(Exception, match="nowhere"):
        parser.parse_args(["distill", "--config", "aircraft", "--nowhere", "1"])


@pytest.mark.parametrize("op", ops.__all__)
def test_every_op_is_documented(op):
    pages = {page: page.read_text() for page in PAGES}
    (page,) = (page for page, text in pages.items() if re.search(rf"(?m)^::: dfkd_fast\.ops\.\w+\.{op}$", text))
    if page.stem == "index":
        return
    assert {"## Complexity", "## Example", "## Reference"} <= set(pages[page].splitlines())


def test_drop_in_tables_are_up_to_date():
    tables = coverage_tables(ROOT / "dfkd_fast" / "compat")
    assert f"<!-- begin: coverage -->\n{tables}\n<!-- end: coverage -->" in (ROOT / "docs" / "swapping.md").read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if of(page, "yaml")], ids=name)
def test_yaml_parses(page):
    for block in of(page, "yaml"):
        assert yaml.safe_load(block.code), f"{name(page)}:{block.line}"
