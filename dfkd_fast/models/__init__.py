"""Teachers and students: networks by name, their weights, and what a distillation needs of them besides the logits."""

from dfkd_fast.graph import (
    FeatureModel,
    LayerStatistics,
    Outputs,
    batchnorm_mode,
    extract,
    fold_batchnorm,
    frozen,
    held_in,
)
from dfkd_fast.models.create import create_model, names, normalization
from dfkd_fast.models.weights import (
    WeightsFormatError,
    WeightsMismatch,
    WeightsReport,
    load_weights,
    read_metadata,
    save_weights,
)

__all__ = [
    "FeatureModel",
    "LayerStatistics",
    "Outputs",
    "WeightsFormatError",
    "WeightsMismatch",
    "WeightsReport",
    "batchnorm_mode",
    "create_model",
    "extract",
    "fold_batchnorm",
    "frozen",
    "held_in",
    "load_weights",
    "names",
    "normalization",
    "read_metadata",
    "save_weights",
]
