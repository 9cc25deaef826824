"""Loss modules that users have copies of, and the drop-in of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.compat import cpsc, datafree, repdistiller
from dfkd_fast.patching.forward import PatchedForward, Refused, hooked, own_forward, verify

__all__ = ["LOSSES", "loss"]


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """A class by what it must have.

    Attributes:
        drop_in: of the same attributes and arguments.
        of: its module, for the report.
        attributes: what the drop-in's forward reads of itself.
        tried_on: the arguments of several calls.
    """

    drop_in: type[nn.Module]
    of: str
    attributes: frozenset[str]
    tried_on: Callable[[], Sequence[tuple[Tensor, ...]]]


def _logits() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(3 * torch.randn(2, 5, 7, generator=generator))]


def _views() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    views = nn.functional.normalize(torch.randn(6, 2, 8, generator=generator), dim=2)
    return [(views,), (views, torch.tensor([0, 1, 0, 2, 1, 0]))]


_CONTRAST = frozenset({"temperature", "contrast_mode", "base_temperature"})

LOSSES = {
    "KLDiv": _Loss(drop_in=datafree.KLDiv, of="datafree", attributes=frozenset({"T", "reduction"}), tried_on=_logits),
    "DistillKL": _Loss(
        drop_in=repdistiller.DistillKL, of="repdistiller", attributes=frozenset({"T"}), tried_on=_logits
    ),
    "SupConLoss": _Loss(drop_in=cpsc.SupConLoss, of="cpsc", attributes=_CONTRAST, tried_on=_views),
    "ContrastLoss": _Loss(drop_in=datafree.ContrastLoss, of="datafree", attributes=_CONTRAST, tried_on=_views),
}
"""By the class's name."""


def _dropped_in(forward: Any, *args: Any, **kwargs: Any) -> Any:
    # On the user's module, whose attributes count as they are at the call.
    return LOSSES[type(forward.model).__name__].drop_in.forward(forward.model, *args, **kwargs)


def loss(module: nn.Module) -> PatchedForward:
    """The drop-in for a loss module: recognised by the class's name and by its attributes, then tried."""
    own_forward(module)
    name = type(module).__name__
    known = LOSSES[name]
    if type(module) is known.drop_in:
        raise Refused("the drop-in itself")
    missing = sorted(known.attributes - module.__dict__.keys())
    if missing or next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        raise Refused(f"{name} does not have the attributes of {known.of}'s, or more than them")
    if hooked(module):
        raise Refused("a hook watches it")
    forward = PatchedForward(module, one_map=False)
    forward.program = _dropped_in
    forward.replaced = [(module, f"compat.{known.of}.{name}")]
    device = getattr(module, "device", "cpu")
    for args in known.tried_on():
        try:
            given = [arg.to(device) for arg in args]
        except (RuntimeError, TypeError) as error:
            raise Refused(f"{name} is for {device}, and cannot be tried here") from error
        verify(forward, *given, gradients=True)
    return forward
