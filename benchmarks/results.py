"""Result files of the benchmarks: JSON rows together with the machine and the versions that produced them."""

from __future__ import annotations

import argparse
import fcntl
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dfkd_fast.config import expand
from dfkd_fast.report import environment, read_results, timestamp, write_results

__all__ = ["Key", "Results", "commits", "dtype_name", "measured_on", "parser", "rounded"]

Key = tuple[Any, ...]

_environment = functools.cache(environment)


def rounded(value: Any, digits: int = 5) -> Any:
    """Round floats in nested dicts and lists to significant digits."""
    if isinstance(value, dict):
        return {name: rounded(each, digits) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def dtype_name(dtype: Any) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def parser(
    description: str | None, *, small: str, sizes: Sequence[str] = ("full", "small"), out: bool = True
) -> argparse.ArgumentParser:
    """Return a measurement's parser. ``small`` describes its small size; ``out`` makes the result file required."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=out, help="result file")
    found.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    found.add_argument("--size", choices=sizes, default="full", help=f"small: {small}")
    return found


def commits(environments: Iterable[dict[str, Any]]) -> str:
    """Return the commits of some environments, for the caption of a table."""
    return ", ".join(sorted({(block["commit"] or f"sources {block['source']}")[:12] for block in environments}))


def measured_on(content: dict[str, Any]) -> str:
    """Return device, PyTorch version and commit of a result file's newest environment, for the caption of a table."""
    block = content["environments"][-1]
    return f"{block['device']['name']}, torch {block['torch']}, commit {(block['commit'] or block['source'])[:12]}"


class Results:
    """The rows of one result file, written to disk one by one. Several processes may write to the same file.

    A file contains ``environments`` (machine, versions, commit), ``rows`` and further facts. A row has the fields of
    its key, the measurements, ``date`` and ``environment``, an index into ``environments``. A new row replaces the row
    with the same key. ``facts``, such as measured peak rates, are added to the file and to this process's environment.
    """

    def __init__(self, path: Path, *, key: Sequence[str], facts: dict[str, Any] | None = None) -> None:
        self.path, self.key, self.facts = expand(path), tuple(key), facts or {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows of the file, including those of other processes."""
        return self._read()["rows"]

    def key_of(self, row: dict[str, Any]) -> Key:
        """The key of a row."""
        return tuple(row[name] for name in self.key)

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, with its date and environment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f".{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = {**self._read(), **self.facts}
            here = {**_environment(), **self.facts}
            known = [{**block, "date": None} for block in content["environments"]]
            if {**here, "date": None} not in known:
                content["environments"].append(here)
                known.append({**here, "date": None})
            index = known.index({**here, "date": None})
            key = self.key_of(row)
            content["rows"] = [other for other in content["rows"] if self.key_of(other) != key]
            content["rows"].append({**rounded(row), "date": timestamp(), "environment": index})
            write_results(self.path, content)

    def _read(self) -> dict[str, Any]:
        return read_results(self.path) or {"environments": [], "rows": []}
