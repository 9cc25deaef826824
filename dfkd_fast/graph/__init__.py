"""Graph rewrites: features and BatchNorm statistics as outputs, folded and fused BatchNorms, ``patch``."""

from dfkd_fast.graph.extract import FeatureModel, extract
from dfkd_fast.graph.folding import cast_weights, fold_batchnorm
from dfkd_fast.graph.modes import batchnorm_mode, frozen, preserve_train_mode
from dfkd_fast.graph.outputs import LayerStatistics, Outputs
from dfkd_fast.graph.patching import Left, PatchReport, Replaced, patch, unpatch
from dfkd_fast.graph.tracing import require_separate, unwrap

__all__ = [
    "FeatureModel",
    "LayerStatistics",
    "Left",
    "Outputs",
    "PatchReport",
    "Replaced",
    "batchnorm_mode",
    "cast_weights",
    "extract",
    "fold_batchnorm",
    "frozen",
    "patch",
    "preserve_train_mode",
    "require_separate",
    "unpatch",
    "unwrap",
]
