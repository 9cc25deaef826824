"""The method's modules. They hold parameters and call :mod:`dfkd_fast.ops`.

Each can be used in other code: it depends only on torch and the ops.
"""

from dfkd_fast.deprecated import renamed
from dfkd_fast.nn.attention import HighOrderAttention, SpatialAttention
from dfkd_fast.nn.contrast import SemanticFeatureContrast
from dfkd_fast.nn.generator import GENERATORS, AttentionGenerator, UpsamplingGenerator, freeze_spectral_norm
from dfkd_fast.nn.heads import ProjectionHead
from dfkd_fast.nn.norm import batch_norm_act

__all__ = [
    "GENERATORS",
    "AttentionGenerator",
    "HighOrderAttention",
    "ProjectionHead",
    "SemanticFeatureContrast",
    "SpatialAttention",
    "UpsamplingGenerator",
    "batch_norm_act",
    "freeze_spectral_norm",
]

__getattr__ = renamed(__name__, spectral_norm_held="dfkd_fast.nn.freeze_spectral_norm")
