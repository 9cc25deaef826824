"""The method's operations as functions of tensors, each with one or more backends.

Each function checks its arguments, selects a backend (see :class:`backend`) and calls it. All are differentiable,
support ``torch.compile(fullgraph=True)`` and autocast, and accept non-contiguous tensors and empty batches.
"""

from dfkd_fast.ops.backend import backend, backends
from dfkd_fast.ops.batch_norm_act import batch_norm_act
from dfkd_fast.ops.batch_norm_act_conv1x1 import batch_norm_act_conv1x1
from dfkd_fast.ops.batchnorm_statistics import batchnorm_statistics, channel_statistics, merge_statistics
from dfkd_fast.ops.contrastive_loss import contrastive_loss
from dfkd_fast.ops.distillation_kl import distillation_kl
from dfkd_fast.ops.high_order_attention import high_order_attention, high_order_attention_map
from dfkd_fast.ops.high_order_attention_mse import high_order_attention_mse
from dfkd_fast.ops.max_pool2x2 import max_pool2x2, max_unpool2x2
from dfkd_fast.ops.spatial_attention import spatial_attention
from dfkd_fast.ops.statistics_distance import statistics_distance, statistics_distances

__all__ = [
    "backend",
    "backends",
    "batch_norm_act",
    "batch_norm_act_conv1x1",
    "batchnorm_statistics",
    "channel_statistics",
    "contrastive_loss",
    "distillation_kl",
    "high_order_attention",
    "high_order_attention_map",
    "high_order_attention_mse",
    "max_pool2x2",
    "max_unpool2x2",
    "merge_statistics",
    "spatial_attention",
    "statistics_distance",
    "statistics_distances",
]
