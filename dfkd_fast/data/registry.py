"""The registry of data sets, and checks that a data set's files exist."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dfkd_fast.config import DataConfig
from dfkd_fast.data.image_data import ImageData

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


DATASETS: dict[str, type[ImageSet]] = {}
"""The registered data sets by ``DataConfig.name``."""


def register(name: str) -> Callable[[type[ImageSet]], type[ImageSet]]:
    """Class decorator that registers a data set as ``DataConfig(name=name)``."""

    def add(cls: type[ImageSet]) -> type[ImageSet]:
        DATASETS[name] = cls
        return cls

    return add


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
        root = Path(config.root)
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

    def lines(self, path: Path) -> list[str]:
        """The non-blank lines of an annotation file.

        Raises:
            DatasetNotFound: the file does not exist.
            ValueError: the file is empty.
        """
        self.require([path])
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{self.title}: {path} is empty")
        return lines

    def table(self, path: Path) -> list[tuple[str, str]]:
        """The lines of an annotation file, split at the first space.

        Raises:
            DatasetNotFound: the file does not exist.
            ValueError: the file is empty, or a line has only one column.
        """
        rows = []
        for line in self.lines(path):
            key, _, rest = line.partition(" ")
            if not rest:
                raise ValueError(f"{self.title}: {path} must have two columns, got the line {line!r}")
            rows.append((key, rest.strip()))
        return rows
