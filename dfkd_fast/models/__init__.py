"""Teachers and students: networks by name, weights, features and BatchNorm statistics."""

import warnings
from typing import Any

from dfkd_fast.graph import (
    FeatureModel,
    LayerStatistics,
    Outputs,
    batchnorm_mode,
    cast_weights,
    extract,
    fold_batchnorm,
    frozen,
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
    "cast_weights",
    "create_model",
    "extract",
    "fold_batchnorm",
    "frozen",
    "load_weights",
    "names",
    "normalization",
    "read_metadata",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name == "held_in":  # its name before 0.2
        warnings.warn("dfkd_fast.models.held_in is now cast_weights", DeprecationWarning, stacklevel=2)
        return cast_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
