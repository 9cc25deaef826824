"""The registry of data sets, and checks that a data set's files exist."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dfkd_fast.config import DataConfig, expand, reading, require_file
from dfkd_fast.data.image_data import ImageData
from dfkd_fast.registry import Registry

__all__ = ["DATASETS", "DatasetNotFound", "ImageSet", "Layout", "register"]


class ImageSet:
    """Base class of data sets. Subclass it in a module of this folder and :func:`register` it.

    Attributes:
        classes: the number of classes; None if it depends on the files.
        layout: the files of the data set; not set if it reads none.
    """

    classes: ClassVar[int | None] = None
    layout: ClassVar[Layout]

    @classmethod
    def num_classes(cls, config: DataConfig) -> int | None:
        """The number of classes, without reading files; None if it depends on the files."""
        return cls.classes

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        """Load the data set.

        Raises:
            DatasetNotFound: files are missing.
            ValueError: a field is not supported, or annotations are inconsistent.
        """
        raise NotImplementedError


_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # no text contains these

DATASETS: Registry[type[ImageSet]] = Registry("data set", "DataConfig.name")
"""The registered data sets by ``DataConfig.name``."""


register = DATASETS.register
"""Class decorator that registers a data set as ``DataConfig(name=name)``."""


class DatasetNotFound(FileNotFoundError):
    """Files of a data set are missing.

    Args:
        missing: the first missing file or folder; also in ``filename``.
        layout: the expected files.
    """

    def __init__(self, missing: Path, layout: Layout) -> None:
        tree = textwrap.indent(textwrap.dedent(layout.tree).strip(), "  ")
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
    """The files of a data set.

    Args:
        title: name of the data set.
        tree: the files and folders under the root, for error messages; common indentation is removed.
        source: where the data set is published.
    """

    title: str
    tree: str
    source: str

    def root(self, config: DataConfig) -> Path:
        """The root folder.

        Raises:
            ValueError: ``config.root`` is None.
            DatasetNotFound: ``config.root`` is not a folder.
        """
        if config.root is None:
            raise ValueError(f"DataConfig.root must be the folder that contains {self.title}, got None")
        root = expand(config.root)
        if not root.is_dir():
            raise DatasetNotFound(root, self)
        return root

    def require(self, paths: Iterable[Path]) -> None:
        """Check that all paths exist. Each folder is listed only once.

        Raises:
            DatasetNotFound: a path is missing; the message names the first missing path.
        """
        listed: dict[Path, set[str]] = {}
        for path in paths:
            folder = path.parent
            if folder not in listed:
                listed[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
            if path.name not in listed[folder]:
                raise DatasetNotFound(path, self)

    def error(self, path: Path, line: int | str | None, problem: str) -> ValueError:
        """An error that names the file and, if it is not None, the line."""
        where = "" if line is None else f", line {line}," if isinstance(line, int) else f", {line},"
        return ValueError(f"{self.title}: {path}{where} {problem}")

    def lines(self, path: Path) -> list[tuple[int, str]]:
        """The numbers, counted from 1, and the text of the non-blank lines of an annotation file.

        The encoding is UTF-8 or UTF-16 with a byte order mark, UTF-8, or else Latin-1.

        Raises:
            DatasetNotFound: the file does not exist.
            OSError: the file cannot be read.
            ValueError: the file is empty or not a text file.
        """
        self.require([path])
        with reading(path):
            content = require_file(path).read_bytes()
        try:
            text = content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        # str.splitlines would also split at characters such as \x85, which are letters in other encodings.
        lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1)]
        for number, line in lines:
            if found := _CONTROL.search(line):
                byte = "zero byte" if found[0] == "\0" else f"control character {found[0]!r}"
                raise self.error(path, number, f"contains a {byte}; save the file as UTF-8 text")
        lines = [(number, line) for number, line in lines if line]
        if not lines:
            raise self.error(path, None, "is empty")
        return lines

    def table(self, path: Path) -> list[tuple[int, str, str]]:
        """The number, the first column and the rest of each non-blank line of an annotation file.

        Raises:
            DatasetNotFound: the file does not exist.
            ValueError: the file is empty or not a text file, or a line has only one column.
        """
        rows = []
        for number, line in self.lines(path):
            key, *rest = line.split(maxsplit=1)
            if not rest:
                raise self.error(path, number, f"must have two columns, got the line {line!r}")
            rows.append((number, key, rest[0]))
        return rows

    def mapping(self, path: Path) -> dict[str, tuple[int, str]]:
        """The number and the rest of each non-blank line by its first column.

        Raises:
            DatasetNotFound: the file does not exist.
            ValueError: like :meth:`table`, or two lines with the same first column differ.
        """
        found: dict[str, tuple[int, str]] = {}
        for number, key, rest in self.table(path):
            first, other = found.setdefault(key, (number, rest))
            if rest != other:
                raise self.error(path, number, f"has {rest!r} for {key}, but line {first} has {other!r}")
        return found
