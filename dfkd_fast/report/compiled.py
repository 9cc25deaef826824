"""The report of the kernels that were compiled ahead of time, ``kernels/compiled.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["compiled_path", "read_compiled", "write_compiled"]

_COLUMNS = (
    "key",
    "op",
    "case",
    "kernel",
    "arch",
    "constants",
    "num_warps",
    "num_stages",
    "registers",
    "stack",
    "local",
    "shared",
    "wgmma",
    "mma",
)


def compiled_path() -> Path:
    """Where the report stands: beside the kernels."""
    return Path(str(resources.files("dfkd_fast.kernels"))) / "compiled.json"


def read_compiled() -> dict[str, Any]:
    """The report, its rows as dicts; without rows where there is none."""
    path = compiled_path()
    if not path.exists():
        return {"triton": None, "rows": []}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {**content, "rows": [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]}


def write_compiled(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the report by sound rows. One line a row, in a fixed order, so that a change shows as one."""
    import triton

    ordered = sorted(rows, key=lambda row: (row["op"], row["kernel"], row["arch"], row["case"], row["key"]))
    lines = ",\n".join(json.dumps([row[name] for name in _COLUMNS], separators=(",", ":")) for row in ordered)
    head = f'"triton": {json.dumps(triton.__version__)}, "columns": {json.dumps(_COLUMNS)}'
    compiled_path().write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
