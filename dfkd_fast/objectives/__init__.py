"""Named loss terms, their weighted sums, and the published methods as presets."""

from dfkd_fast.objectives.objective import Objective, generator_objective, student_objective
from dfkd_fast.objectives.presets import GENERATOR_TERMS, PRESETS, STUDENT_TERMS, Preset
from dfkd_fast.objectives.terms import (
    TERMS,
    ActivationNorm,
    AttentionTransfer,
    BatchNormStatistics,
    ClassBalance,
    Distillation,
    FeatureShapes,
    HighOrderAttentionDistillation,
    LogitDistance,
    OneHot,
    SemanticFeatureContrast,
    Term,
)

__all__ = [
    "GENERATOR_TERMS",
    "PRESETS",
    "STUDENT_TERMS",
    "TERMS",
    "ActivationNorm",
    "AttentionTransfer",
    "BatchNormStatistics",
    "ClassBalance",
    "Distillation",
    "FeatureShapes",
    "HighOrderAttentionDistillation",
    "LogitDistance",
    "Objective",
    "OneHot",
    "Preset",
    "SemanticFeatureContrast",
    "Term",
    "generator_objective",
    "student_objective",
]
