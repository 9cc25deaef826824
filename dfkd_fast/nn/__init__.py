"""Modules of the method. They hold parameters and call :mod:`dfkd_fast.ops` for the mathematics."""

from dfkd_fast.nn.attention import HighOrderAttention, SpatialAttention
from dfkd_fast.nn.generator import AttentionGenerator, spectral_norm_held
from dfkd_fast.nn.heads import ProjectionHead

__all__ = ["AttentionGenerator", "HighOrderAttention", "ProjectionHead", "SpatialAttention", "spectral_norm_held"]
