"""Registries of named parts, such as loss terms and generators, which other packages can extend.

A name is one that is registered, one that an installed package registers, or for some registries
``package.module:factory``. A package registers its parts when its module is imported. It names the module in an entry
point of the group ``dfkd_fast.plugins``, so that commands find the parts without importing the package::

    [project.entry-points."dfkd_fast.plugins"]
    mine = "mine.parts"
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import operator
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Registry", "import_factory", "load_plugins"]

T = TypeVar("T")


@functools.cache
def load_plugins() -> None:
    """Import the modules of the entry points in the group ``dfkd_fast.plugins``, once.

    Raises:
        ImportError: a module of an installed package cannot be imported; the message names its entry point.
    """
    for entry in importlib.metadata.entry_points(group="dfkd_fast.plugins"):
        try:
            entry.load()
        except Exception as error:
            raise ImportError(f"the entry point {entry.name} = {entry.value!r} cannot be imported: {error}") from error


def import_factory(name: str, field: str) -> Callable[..., Any]:
    """Import ``package.module:factory``.

    Args:
        name: the module, a colon, and the path of the factory in it.
        field: name of the config's field, for messages.

    Raises:
        ValueError: there is no such module or factory, or it is not callable.
    """
    module_name, _, factory_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{field}: {name!r}: cannot import the module {error.name!r}; install it or add its folder to PYTHONPATH"
        ) from error
    try:
        factory = operator.attrgetter(factory_name)(module)
    except AttributeError as error:
        close = difflib.get_close_matches(factory_name, dir(module), n=3)
        hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"{field}: {name!r}: {module_name} has no {factory_name!r}{hint}") from error
    if not callable(factory):
        raise ValueError(f"{field}: {name!r} must be callable, got a {type(factory).__name__}")
    return factory


class Registry(dict[str, T]):
    """Parts by name.

    Args:
        kind: name of the kind of parts in messages, for example ``generator``.
        field: name of the config's field, for messages.
        factories: whether a name can be ``package.module:factory``.
    """

    def __init__(self, kind: str, field: str, *, factories: bool = False) -> None:
        super().__init__()
        self.kind, self.field, self.factories = kind, field, factories

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a part. A part that is registered again, as when a module is reloaded, is replaced.

        Raises:
            ValueError: the name contains a colon.
        """
        if ":" in name:
            raise ValueError(f"a {self.kind}'s name must not contain a colon, got {name!r}")

        def add(part: T) -> T:
            self[name] = part
            return part

        return add

    def find(self, name: str) -> T:
        """Return the part of a name. If it is unknown, import the plugins of installed packages first.

        Raises:
            ValueError: the name is unknown. The message lists the known names.
        """
        if self.factories and ":" in name:
            return import_factory(name, self.field)  # type: ignore[return-value]
        if name not in self:
            load_plugins()
        if name not in self:
            close = difflib.get_close_matches(name, self, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(self)}"
            raise ValueError(f"{self.field}: no {self.kind} named {name!r}; {hint}")
        return self[name]
