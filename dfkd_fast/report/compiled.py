"""The report of the kernels that were compiled ahead of time, ``kernels/compiled.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["compiled_path", "read_compiled", "write_compiled"]


def compiled_path() -> Path:
    """Where the report stands: beside the kernels."""
    return Path(str(resources.files("dfkd_fast.kernels"))) / "compiled.json"


def read_compiled() -> dict[str, Any]:
    """The report; without rows where there is none."""
    path = compiled_path()
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"triton": None, "rows": []}


def write_compiled(rows: Sequence[dict[str, Any]]) -> None:
    """Replace the report. One line a row, in a fixed order, so that a change shows as one."""
    import triton

    ordered = sorted(rows, key=lambda row: (row["op"], row["kernel"], row["arch"], row["case"], row["key"]))
    lines = ",\n".join(json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in ordered)
    compiled_path().write_text(
        f'{{"triton": {json.dumps(triton.__version__)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )
