"""Weighted sums of loss terms."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dfkd_fast.config import ObjectiveConfig
from dfkd_fast.graph import FeatureModel, Outputs
from dfkd_fast.objectives.presets import PRESETS
from dfkd_fast.objectives.terms import TERMS, Batch, FeatureShapes, Term
from dfkd_fast.registry import load_plugins

__all__ = ["Objective", "generator_objective", "required_outputs", "student_objective"]


class Objective(nn.Module):
    """A weighted sum of loss terms, to be minimized.

    Args:
        terms: the terms by name.
        weights: one weight per term.

    Raises:
        ValueError: terms and weights have different names.
    """

    def __init__(self, terms: Mapping[str, Term], weights: Mapping[str, float]) -> None:
        super().__init__()
        if set(terms) != set(weights):
            raise ValueError(f"terms and weights must have the same names, got {sorted(terms)} and {sorted(weights)}")
        self.terms = nn.ModuleDict(terms)
        self.weights = dict(weights)
        self.names = tuple(terms)
        self.needs: frozenset[str] = frozenset().union(*(term.needs for term in terms.values()))
        self.reads_features = any(term.reads_features for term in terms.values())

    def forward(self, teacher: Outputs, student: Outputs | None, batch: Batch | None = None) -> tuple[Tensor, Tensor]:
        """The weighted sum, a float32 scalar, and the unweighted values, (len(names),), detached.

        ``batch`` is required if a term needs it.
        """
        given: dict[str, Any] = {name: (batch,) for name, kind in self.kinds().items() if "batch" in kind.needs}
        values = [self.terms[name](teacher, student, *given.get(name, ())).float() for name in self.names]
        # Weights stay Python floats: a tensor would be copied from the host in every step.
        total, *others = (self.weights[name] * value for name, value in zip(self.names, values, strict=True))
        for weighted in others:
            total = total + weighted
        return total, torch.stack(values).detach()

    def kinds(self) -> dict[str, Term]:
        """The terms by name."""
        return dict(self.terms.items())  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return " + ".join(f"{self.weights[name]:g} * {name}" for name in self.names)


def _weights(
    side: str, preset: Mapping[str, float], own: Mapping[str, float], known: tuple[str, ...]
) -> dict[str, float]:
    for name in own:
        if name not in known:
            hint = get_close_matches(name, known, n=1)
            raise ValueError(
                f"ObjectiveConfig.{side} has no term {name!r}"
                + (f"; did you mean {hint[0]!r}? " if hint else ". ")
                + f"The {side}'s terms are {', '.join(known)}"
            )
    weights = {name: float(weight) for name, weight in {**preset, **own}.items() if weight != 0}
    if not weights:
        raise ValueError(f"ObjectiveConfig.{side} has no term with a nonzero weight")
    return weights


def _weights_of(side: str, config: ObjectiveConfig) -> dict[str, float]:
    preset, own = PRESETS.find(config.preset), getattr(config, side)
    if any(name not in TERMS for name in own):
        load_plugins()
    known = tuple(name for name, term in TERMS.items() if side in term.sides)
    return _weights(side, getattr(preset, side), own, known)


def required_outputs(config: ObjectiveConfig) -> Literal["stages", "penultimate", "logits"]:
    """The outputs of both networks that the loss terms read, for :func:`dfkd_fast.models.extract`.

    Raises:
        ValueError: unknown preset or term, or no term has a nonzero weight.
    """
    terms = [TERMS[name] for side in ("generator", "student") for name in _weights_of(side, config)]
    if any(term.uses_stages(config) for term in terms):
        return "stages"
    return "penultimate" if any(term.reads_features for term in terms) else "logits"


def _build(side: str, config: ObjectiveConfig, teacher: FeatureModel, student: FeatureModel) -> Objective:
    weights = _weights_of(side, config)
    shapes = FeatureShapes.of(teacher, student)
    return Objective({name: TERMS[name].build(shapes, config) for name in weights}, weights)


def generator_objective(config: ObjectiveConfig, teacher: FeatureModel, student: FeatureModel) -> Objective:
    """The generator's loss (Eq. 10): the preset's weights, updated by ``config.generator``.

    Raises:
        ValueError: unknown preset or term, or no term has a nonzero weight.
    """
    return _build("generator", config, teacher, student)


def student_objective(config: ObjectiveConfig, teacher: FeatureModel, student: FeatureModel) -> Objective:
    """The student's loss (Eq. 11): the preset's weights, updated by ``config.student``.

    Its parameters (adapters, attention modules, projection heads) are trained with the student.

    Raises:
        ValueError: unknown preset or term, no term has a nonzero weight, or the networks' stages cannot be paired.
    """
    return _build("student", config, teacher, student)
