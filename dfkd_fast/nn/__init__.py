"""Modules of the method. They hold parameters and call :mod:`dfkd_fast.ops` for the mathematics.

Each stands alone, to be lifted into other code: none needs anything else of the package but the ops.
"""

from dfkd_fast.nn.attention import HighOrderAttention, SpatialAttention
from dfkd_fast.nn.contrast import SemanticFeatureContrast
from dfkd_fast.nn.generator import AttentionGenerator, freeze_spectral_norm
from dfkd_fast.nn.heads import ProjectionHead

__all__ = [
    "AttentionGenerator",
    "HighOrderAttention",
    "ProjectionHead",
    "SemanticFeatureContrast",
    "SpatialAttention",
    "freeze_spectral_norm",
]
