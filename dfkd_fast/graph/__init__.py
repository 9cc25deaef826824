"""What rewrites a network: features and BatchNorm statistics as outputs, folded and fused BatchNorms, ``patch``."""

from dfkd_fast.graph.extract import FeatureModel, extract
from dfkd_fast.graph.folding import fold_batchnorm, held_in
from dfkd_fast.graph.modes import batchnorm_mode, frozen, modes_kept
from dfkd_fast.graph.outputs import LayerStatistics, Outputs
from dfkd_fast.graph.patching import Left, PatchReport, Replaced, patch, unpatch

__all__ = [
    "FeatureModel",
    "LayerStatistics",
    "Left",
    "Outputs",
    "PatchReport",
    "Replaced",
    "batchnorm_mode",
    "extract",
    "fold_batchnorm",
    "frozen",
    "held_in",
    "modes_kept",
    "patch",
    "unpatch",
]
