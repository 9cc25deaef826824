"""The data sets by name, and the checks of a published tree before anything is read from it."""

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
    """A labelled set of images. Subclass it in a module of this folder and register it under its name.

    Attributes:
        classes: the number of classes; None where only the files tell.
        layout: the tree that the set is read from; a set that reads no tree has none.
    """

    classes: ClassVar[int | None] = None
    layout: ClassVar[Layout]

    @classmethod
    def num_classes(cls, config: DataConfig) -> int | None:
        """The number of classes before anything is read; None where only the files tell."""
        return cls.classes

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        """Read or draw the set.

        Raises:
            DatasetNotFound: a part of the tree is missing.
            ValueError: a field that the set cannot take, or annotations that do not fit together.
        """
        raise NotImplementedError


DATASETS: dict[str, type[ImageSet]] = {}
"""The registered sets, by ``DataConfig.name``."""


def register(name: str) -> Callable[[type[ImageSet]], type[ImageSet]]:
    """Decorator: make a set known as ``DataConfig(name=name)``."""

    def add(cls: type[ImageSet]) -> type[ImageSet]:
        DATASETS[name] = cls
        return cls

    return add


class DatasetNotFound(FileNotFoundError):
    """A data set, or a part of it, is missing.

    Args:
        missing: the first file or folder that is not there; also in ``filename``.
        layout: what was expected.
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
        title: name of the set.
        tree: the files and folders under the root, as a drawing of a few lines; common indentation is removed.
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
