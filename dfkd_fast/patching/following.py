"""The forward of one module as a graph, without following the modules below it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from dfkd_fast.models.tracing import Root, Trace
from dfkd_fast.patching.forward import Refused, first_line

__all__ = ["Followed", "attributes_kept", "follow"]

_HELD = (list, dict, set)


class _Tracer(fx.Tracer):
    """Follows the forward of one module and of none below it, so that hooks and calls from elsewhere reach those."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name != "model"


class Followed(Trace):
    """A graph of a module that need not be a classifier."""

    def __init__(self, root: Root, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph


def _state(module: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The attributes of a module and of all below it, and a copy one level deeper."""
    for each in module.modules():
        held = each.__dict__
        yield held, {name: copy.copy(value) if type(value) in _HELD else value for name, value in held.items()}


def _same(value: Any, before: Any) -> bool:
    if type(value) is not type(before):
        return False
    if isinstance(value, dict):
        return value.keys() == before.keys() and all(value[name] is before[name] for name in value)
    if isinstance(value, list):
        return len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))
    return value == before if isinstance(value, set) else value is before


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[list[str]]:
    """What a forward sets on its modules is as before on leaving, and its names are in the list that is yielded."""
    saved = list(_state(module))
    containers = [{name: value for name, value in held.items() if type(value) in _HELD} for held, _ in saved]
    written: list[str] = []
    try:
        yield written
    finally:
        for (held, before), lists in zip(saved, containers, strict=True):
            changed = [
                name
                for name in held.keys() | before.keys()
                if not _same(held.get(name), before.get(name)) or held.get(name) is not lists.get(name, held.get(name))
            ]
            written += changed
            for name in changed:
                if name not in before:
                    del held[name]
                elif name in lists:  # the very object, with its former content
                    container, content = lists[name], before[name]
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(content)
                    held[name] = container
                else:
                    held[name] = before[name]


def follow(module: nn.Module) -> fx.Graph:
    """The graph of a module's forward of one argument, in its present mode."""
    root = Root(module)
    with attributes_kept(module) as written:
        try:
            graph = _Tracer().trace(root)
        except Exception as error:  # whatever a forward does when its input is no tensor
            raise Refused(
                f"the forward of {type(module).__name__} cannot be followed by torch.fx: {first_line(error)}"
            ) from error
    if written:
        raise Refused(f"the forward of {type(module).__name__} sets {', '.join(sorted(set(written)))}")
    for node in graph.find_nodes(op="get_attr"):
        if not str(node.target).startswith("model."):
            raise Refused(f"the forward of {type(module).__name__} makes tensors of its own")
    return graph
