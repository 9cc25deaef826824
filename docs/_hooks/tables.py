"""Tables and listings of the pages, made from the code that they are about."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
COMPAT = ROOT / "dfkd_fast" / "compat"

ORIGINALS = {
    "datafree": "DataFree and CMI, Fast-Datafree, NAYER",
    "deepinversion": "NVlabs/DeepInversion",
    "cpsc": "CPSC-DFKD",
    "lightly": "lightly",
    "metric_learning": "pytorch-metric-learning",
    "repdistiller": "RepDistiller",
    "mdistiller": "mdistiller",
    "torchdistill": "torchdistill",
}


def _assigned(path: Path, name: str) -> ast.expr:
    """What a module assigns to a name at its top, read and not imported: some need the library that they stand for."""
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.value  # type: ignore[attr-defined]
    raise LookupError(f"{path} assigns nothing to {name}")


def coverage(module: str) -> list[tuple[str, str, str | None]]:
    """Name, case and op of each line of a module's ``COVERAGE``."""
    lines: Any = _assigned(COMPAT / f"{module}.py", "COVERAGE")
    return [tuple(ast.literal_eval(argument) for argument in line.args) for line in lines.elts]


def drop_ins() -> str:
    """A section with a table for each module of dfkd_fast.compat."""
    parts = []
    for module in ast.literal_eval(_assigned(COMPAT / "__init__.py", "MODULES")):
        parts += [f"### {ORIGINALS[module]}", "", f"`from dfkd_fast.compat.{module} import ...`", ""]
        parts += ["| drop-in | called with | computed by |", "|---|---|---|"]
        before = ""
        for name, case, op in coverage(module):
            page = "batchnorm_statistics" if op == "channel_statistics" else op
            by = f"[`{op}`](ops/{page}.md)" if op else "plain PyTorch"
            parts.append(f"| {f'`{name}`' if name != before else ''} | {case} | {by} |")
            before = name
        parts.append("")
    return "\n".join(parts)


def example(match: re.Match[str]) -> str:
    """What differs between the two scripts of a folder of examples/, and the second of them whole."""
    before, after = ((ROOT / "examples" / match[1] / f"{name}.py").read_text() for name in ("before", "after"))
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), "before.py", "after.py", n=1, lineterm="")
    # In a box of its own a fence needs the box's indentation.
    script = "".join(f"    {line}".rstrip(" ") for line in f"```python\n{after}```\n".splitlines(keepends=True))
    difference = "\n".join(changed)
    return f'```diff\n{difference}\n```\n\n??? note "examples/{match[1]}/after.py, whole"\n\n{script}'


def filled(markdown: str) -> str:
    """The page with each ``<!-- table: NAME -->`` and ``<!-- example: FOLDER -->`` replaced."""
    markdown = markdown.replace("<!-- table: drop-ins -->", drop_ins())
    return re.sub(r"<!-- example: (\w+) -->", example, markdown)
