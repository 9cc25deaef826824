"""Tables for the terminal and in Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = ["markdown_table", "result_table"]

_NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]?\d+)?\s*(%|x|s|ms|us|GB/s|TFLOP/s)?( [±].*)?", re.IGNORECASE)


def result_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """Build a rich table.

    Columns are in the order of their first use. A missing key or None is an empty cell. Columns of numbers are aligned
    right. Markup in values is not interpreted.

    Args:
        rows: one mapping from column name to value per row.
        title: title above the table; empty for none.
    """
    columns, cells, numeric = _layout(rows)
    table = Table(title=Text(title) if title else None, title_justify="left")
    for name, right in zip(columns, numeric, strict=True):
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    return table


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of :func:`result_table` as lines of Markdown; no lines if there are no rows."""
    columns, cells, numeric = _layout(rows)
    if not columns:
        return []
    rule = "".join("---:|" if right else "---|" for right in numeric)
    lines = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in [columns, *cells])
    head, *body = (f"| {line} |" for line in lines)
    return [head, f"|{rule}", *body]


def _layout(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], list[bool]]:
    """The columns, the cells per row, and whether each column contains only numbers."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    numeric = []
    for index in range(len(columns)):
        filled = [line[index] for line in cells if line[index]]
        numeric.append(bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled))
    return columns, cells, numeric
