"""Tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = ["result_table"]

_NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]?\d+)?\s*(%|x|s|ms|us|GB/s|TFLOP/s)?( [±].*)?", re.IGNORECASE)


def result_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> Table:
    """A rich table of rows that are mappings from column to value.

    Columns appear in the order in which the rows first name them. A missing key or None is an empty cell; a column
    whose filled cells are all numbers is aligned right. Values are printed as they are: markup in them is not
    interpreted.

    Args:
        rows: the cells, by column name.
        title: above the table; empty for none.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [["" if row.get(name) is None else str(row[name]) for name in columns] for row in rows]
    table = Table(title=Text(title) if title else None, title_justify="left")
    for index, name in enumerate(columns):
        filled = [line[index] for line in cells if line[index]]
        numeric = bool(filled) and all(_NUMBER.fullmatch(cell) for cell in filled)
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for line in cells:
        table.add_row(*(Text(cell) for cell in line))
    return table
