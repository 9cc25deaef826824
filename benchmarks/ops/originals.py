"""Plain PyTorch definitions of what ``dfkd_fast.compat`` replaces, for projects that are on no package index.

Each takes the same passes over its data as the project's code and leaves out incidental costs, such as masks copied
from the host, so that no definition is slower than its original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Module(nn.Module):
    """A loss that is a module in its project, with the overhead of calling one."""

    def __init__(self, function: Callable[..., Tensor], **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, **self.options)


def kldiv(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of logits (N, classes), mean over N, times temperature squared."""
    log_q, p = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_q, p, reduction="batchmean")


def jsdiv(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """DataFree's: half of KL(M || P) + KL(M || Q), with probabilities clamped to [0.01, 0.99]."""
    p, q = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    m = torch.clamp(0.5 * (p + q), 0.01, 0.99)
    to_p, to_q = (F.kl_div(torch.log(torch.clamp(x, 0.01, 0.99)), m, reduction="batchmean") for x in (p, q))
    return 0.5 * (to_p + to_q)


def class_balance_loss(logits: Tensor) -> Tensor:
    """Minus the entropy of the mean probabilities (DAFL)."""
    mean = F.softmax(logits, 1).mean(0)
    return (mean * torch.log(mean)).sum()


def onehot_loss(logits: Tensor) -> Tensor:
    """Cross-entropy to the largest class (DAFL)."""
    return F.cross_entropy(logits, logits.max(1).indices)


def _differences(images: Tensor) -> tuple[Tensor, ...]:
    """Differences of neighbours in images (N, C, H, W), in four directions."""
    return (
        images[..., :-1] - images[..., 1:],
        images[..., :-1, :] - images[..., 1:, :],
        images[..., :-1, 1:] - images[..., 1:, :-1],
        images[..., :-1, :-1] - images[..., 1:, 1:],
    )


def absolute_variation(images: Tensor) -> Tensor:
    """Mean absolute differences of neighbours, summed over directions (DataFree)."""
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


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """Cross-entropy over the 2N - 1 other vectors of two views (N, dim), the positive being the class."""
    vectors = torch.cat([F.normalize(first), F.normalize(second)])
    size = len(vectors)
    similarity = vectors @ vectors.T / temperature
    other = ~torch.eye(size, dtype=torch.bool, device=vectors.device)
    logits = similarity[other].view(size, size - 1)
    # Without the diagonal, columns after it move one to the left.
    row = torch.arange(size // 2, device=vectors.device)
    return F.cross_entropy(logits, torch.cat([row + size // 2 - 1, row]))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention (Zagoruyko and Komodakis, ICLR 2017) of maps (N, C, H, W)."""
    height, other = student.shape[2], teacher.shape[2]
    if height > other:
        student = F.adaptive_avg_pool2d(student, (other, other))
    elif height < other:
        teacher = F.adaptive_avg_pool2d(teacher, (height, height))
    a, b = (F.normalize(x.pow(2).mean(1).flatten(1)) for x in (student, teacher))
    return (a - b).pow(2).mean()


class _Hook:
    def __init__(self, module: nn.Module) -> None:
        self.handle = module.register_forward_hook(self.keep)

    def keep(self, module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        raise NotImplementedError


class DeepInversionHook(_Hook):
    """Distance of the statistics of a BatchNorm's input (N, C, H, W) from the stored ones (Yin et al., CVPR 2020).

    The variance is computed on a copy with channels first, as in all the projects.
    """

    def keep(self, module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        (x,) = given
        mean, var = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1, correction=0)
        stored_mean, stored_var = module.running_mean.to(mean.dtype), module.running_var.to(var.dtype)
        self.r_feature = torch.linalg.vector_norm(stored_var - var) + torch.linalg.vector_norm(stored_mean - mean)


class FeatureMeanVarHook(_Hook):
    """Keeps mean and unbiased variance per channel of a copy of a module's input."""

    def keep(self, module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        self.var, self.mean = torch.var_mean(given[0].clone(), (0, 2, 3), correction=1)


class InstanceMeanHook(_Hook):
    """Keeps the mean over positions of a module's input."""

    def keep(self, module: Any, given: tuple[Tensor, ...], output: Any) -> None:
        self.instance_mean = given[0].mean((2, 3))
