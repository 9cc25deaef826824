"""Checks of a data set's tree before anything is read from it, and the error that says what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dfkd_fast.config import DataConfig

__all__ = ["DatasetNotFound", "Layout"]


class DatasetNotFound(FileNotFoundError):
    """A data set is not where it was said to be, or a part of it is missing.

    Args:
        missing: the first file or folder that is not there; also in ``filename``.
        layout: what was expected.
    """

    def __init__(self, missing: Path, layout: Layout) -> None:
        tree = "\n".join(f"  {line}" for line in layout.tree.strip("\n").splitlines())
        super().__init__(
            f"{layout.title}: {missing} is missing.\nExpected under DataConfig.root:\n{tree}\n{layout.source}"
        )
        self.filename = str(missing)
        self.layout = layout

    def __reduce__(self) -> tuple[type[DatasetNotFound], tuple[Path, Layout]]:
        return type(self), (Path(self.filename), self.layout)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk.

    Args:
        title: name of the set.
        tree: the files and folders under the root, as a drawing of a few lines.
        source: where the set is published.
    """

    title: str
    tree: str
    source: str

    def root(self, config: DataConfig) -> Path:
        """The folder to look in.

        Raises:
            ValueError: ``config.root`` is None.
            DatasetNotFound: it is not a folder.
        """
        if config.root is None:
            raise ValueError(f"DataConfig.root must be the folder that holds {self.title}, got None")
        root = Path(config.root)
        if not root.is_dir():
            raise DatasetNotFound(root, self)
        return root

    def require(self, paths: Iterable[Path]) -> None:
        """Refuse a tree that lacks one of ``paths``; each folder is listed once, whatever the number of its files.

        Raises:
            DatasetNotFound: names the first of ``paths`` that is missing.
        """
        listed: dict[Path, set[str]] = {}
        for path in paths:
            folder = path.parent
            if folder not in listed:
                listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            if path.name not in listed[folder]:
                raise DatasetNotFound(path, self)

    def lines(self, path: Path) -> list[str]:
        """The lines of an annotation file that are not blank.

        Raises:
            DatasetNotFound: there is no such file.
            ValueError: the file is empty.
        """
        self.require([path])
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{self.title}: {path} is empty")
        return lines

    def table(self, path: Path) -> list[tuple[str, str]]:
        """The lines of an annotation file as a key and the rest.

        Raises:
            DatasetNotFound: there is no such file.
            ValueError: the file is empty, or a line has one word only.
        """
        rows = []
        for line in self.lines(path):
            key, _, rest = line.partition(" ")
            if not rest:
                raise ValueError(f"{self.title}: {path} must have two columns, got the line {line!r}")
            rows.append((key, rest.strip()))
        return rows
