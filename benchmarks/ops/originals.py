"""Definitions in plain PyTorch of functions that ``dfkd_fast.compat`` replaces, of projects on no package index.

Each makes the same passes over its data as the project's code. Incidental costs, such as masks copied from the CPU, are
omitted, so no definition is slower than its original.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kldiv(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits (N, classes), mean over N, times temperature squared."""
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def jsdiv(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Half of KL(M || P) + KL(M || Q) with probabilities clamped to [0.01, 0.99] (DataFree)."""
    p, q = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    m = torch.clamp(0.5 * (p + q), 0.01, 0.99)
    to_p, to_q = (F.kl_div(torch.log(torch.clamp(x, 0.01, 0.99)), m, reduction="batchmean") for x in (p, q))
    return 0.5 * (to_p + to_q)


def _differences(images: Tensor) -> tuple[Tensor, ...]:
    """Differences between neighbors in images (N, C, H, W), in four directions."""
    return (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, 1:] - images[..., 1:, :-1],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )


def absolute_variation(images: Tensor) -> Tensor:
    """Mean absolute differences between neighbors, summed over directions (DataFree)."""
    a, b, c, d = (step.abs().mean() for step in _differences(images))
    return a + b + c + d


def image_prior(images: Tensor) -> Tensor:
    """Mean absolute differences plus norms of differences (both terms of DeepInversion)."""
    steps = _differences(images)
    a, b, c, d = (step.abs().mean() for step in steps)
    e, f, g, h = (torch.linalg.vector_norm(step) for step in steps)
    return (a + b + c + d) + (e + f + g + h)


def contrast_loss(features: Tensor, *, temperature: float = 0.07, mode: str = "all") -> Tensor:
    """SupConLoss without labels (Khosla et al., NeurIPS 2020) of unit features (N, views, dim): (anchor views, N)."""
    count, views, _ = features.shape
    vectors = torch.cat(features.unbind(1))
    anchor_views = views if mode == "all" else 1
    similarity = vectors[: anchor_views * count] @ vectors.T / temperature
    shifted = similarity - similarity.max(1, keepdim=True).values.detach()
    others = torch.ones_like(shifted, dtype=torch.float32).fill_diagonal_(0)
    positives = torch.eye(count, device=features.device).repeat(anchor_views, views) * others
    log_likelihood = shifted - (shifted.exp() * others).sum(1, keepdim=True).log()
    return -((positives * log_likelihood).sum(1) / positives.sum(1)).view(anchor_views, count)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention (Zagoruyko and Komodakis, ICLR 2017) of maps (N, C, H, W)."""
    size = min(student.shape[2], teacher.shape[2])
    maps = (x if x.shape[2] == size else F.adaptive_avg_pool2d(x, (size, size)) for x in (student, teacher))
    a, b = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in maps)
    return (a - b).pow(2).mean()


class DeepInversionHook:
    """Distance between the batch and the running statistics of a BatchNorm (Yin et al., CVPR 2020).

    The variance is computed on a copy with channels first, as in all the projects.
    """

    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(lambda module, inputs, output: self.read(module, *inputs))

    def read(self, module: Any, x: Tensor) -> None:
        mean, var = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1, correction=0)
        running_mean, running_var = module.running_mean.to(mean.dtype), module.running_var.to(var.dtype)
        self.r_feature = torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)
