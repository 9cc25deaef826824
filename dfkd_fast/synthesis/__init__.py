"""Synthesizers make the images of a run: generators that train next to the student, and pools of optimized images."""

from dfkd_fast.synthesis.base import SYNTHESIZERS, Online, Setting, Synthesizer, create_synthesizer
from dfkd_fast.synthesis.folder import Folder, read_pool, write_pool
from dfkd_fast.synthesis.generators import Contrastive, Fast, LabelEmbedding, Momentum
from dfkd_fast.synthesis.images import DeepInversion, ZeroShot
from dfkd_fast.synthesis.pool import Augment, Pool, PoolSynthesizer, Source, crop_and_flip, to_float, to_uint8

__all__ = [
    "SYNTHESIZERS",
    "Augment",
    "Contrastive",
    "DeepInversion",
    "Fast",
    "Folder",
    "LabelEmbedding",
    "Momentum",
    "Online",
    "Pool",
    "PoolSynthesizer",
    "Setting",
    "Source",
    "Synthesizer",
    "ZeroShot",
    "create_synthesizer",
    "crop_and_flip",
    "read_pool",
    "to_float",
    "to_uint8",
    "write_pool",
]
