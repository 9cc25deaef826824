"""Teachers and students: networks by name, their weights, and what a distillation needs of them beside the logits."""

from dfkd_fast.models.batchnorm import BatchNormWithStatistics
from dfkd_fast.models.create import create_model, names, normalization
from dfkd_fast.models.extract import FeatureModel, extract
from dfkd_fast.models.folding import fold_batchnorm, held_in
from dfkd_fast.models.modes import batchnorm_mode, frozen
from dfkd_fast.models.outputs import LayerStatistics, Outputs
from dfkd_fast.models.weights import (
    WeightsFormatError,
    WeightsMismatch,
    WeightsReport,
    load_weights,
    read_metadata,
    save_weights,
)

__all__ = [
    "BatchNormWithStatistics",
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
