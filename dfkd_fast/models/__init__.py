"""Teachers and students: networks by name, weights, features and BatchNorm statistics."""

from dfkd_fast.deprecated import renamed
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
    WeightsDescription,
    WeightsFormatError,
    WeightsMismatch,
    WeightsReport,
    load_weights,
    read_description,
    read_metadata,
    save_weights,
)

__all__ = [
    "FeatureModel",
    "LayerStatistics",
    "Outputs",
    "WeightsDescription",
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
    "read_description",
    "read_metadata",
    "save_weights",
]

__getattr__ = renamed(__name__, held_in="dfkd_fast.models.cast_weights")
