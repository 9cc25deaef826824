"""Named loss terms, their weighted sums, and the published methods as presets."""

from dfkd_fast.objectives.objective import Objective, generator_objective, required_outputs, student_objective
from dfkd_fast.objectives.presets import PRESETS, Preset
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
    register,
)

__all__ = [
    "PRESETS",
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
    "register",
    "required_outputs",
    "student_objective",
]
