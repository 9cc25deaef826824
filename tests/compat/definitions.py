"""Definitions of the drop-ins in float64, and their comparison with the drop-ins."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dfkd_fast.testing import random

from ..ops.table import assert_matches
from ..ops.test_contrastive_loss import definition as contrastive_loss

REDUCTIONS = ("batchmean", "sum", "mean", "none")


def assert_same(function, definition, *inputs, atol=1e-5):
    """Assert equal values, and equal gradients for random output gradients, with a relative tolerance of 1e-5."""
    assert_matches(function, definition, inputs, atol=atol, rtol=1e-5)


def logits(*shape, seed=0, scale=3.0):
    return random(*shape, seed=seed, scale=scale), random(*shape, seed=seed + 1, scale=scale)


def reduced(terms, reduction):
    if reduction == "batchmean":
        return (terms.sum() / terms.shape[0]).float()
    return (terms if reduction == "none" else getattr(terms, reduction)()).float()


def divergence(student, teacher, temperature=1.0, reduction="batchmean"):
    """KL(teacher || student), from probabilities."""
    q, p = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    return reduced(p * (p.log() - q.log()), reduction)


def jensen_shannon(student, teacher, temperature, reduction):
    p, q = ((x.double() / temperature).softmax(1) for x in (student, teacher))
    p, q, m = (x.clamp(0.01, 0.99) for x in (p, q, 0.5 * (p + q)))
    return 0.5 * (reduced(m * (m / p).log(), reduction) + reduced(m * (m / q).log(), reduction))


def entropy(x):
    """The negative entropy of the mean probabilities."""
    mean = (x.double().exp() / x.double().exp().sum(1, keepdim=True)).mean(0)
    return (mean * mean.log()).sum().float()


def attention_distance(student, teacher, power):
    """Compute each sample in turn, with average pooling if one map is twice the size of the other."""
    size = min(student.shape[2], teacher.shape[2])
    rows = []
    for x in (student, teacher):
        factor = x.shape[2] // size
        x = F.avg_pool2d(x, factor) if factor > 1 else x
        row = (x**power).mean(1).flatten(1)
        rows.append(torch.stack([r / r.norm() for r in row]))
    return ((rows[0] - rows[1]) ** 2).mean()


def differences(x):
    """Differences of neighboring pixels in four directions."""
    h, w = x.shape[2:]
    for di, dj in ((0, 1), (1, 0), (1, 1), (1, -1)):
        a = x[:, :, : h - di, max(0, -dj) : w - max(0, dj)]
        b = x[:, :, di:, max(0, dj) : w + min(0, dj)]
        yield a - b


def absolute_variation(x):
    return sum(d.abs().mean() for d in differences(x))


def euclidean_variation(x):
    return sum(d.square().sum().sqrt() for d in differences(x))


def nt_xent(out0, out1, temperature):
    """Algorithm 1 of SimCLR."""
    return contrastive_loss(out0.double(), out1.double(), temperature=temperature, symmetric=True).float()


def sup_con(features, positives, temperature, base_temperature, mode):
    """SupContrast's loss from its formula, one value per anchor, (anchor views, N)."""
    features = features.double().flatten(2)
    count, views, _ = features.shape
    anchors = [(v, i) for v in range(views if mode == "all" else 1) for i in range(count)]
    everything = [(v, i) for v in range(views) for i in range(count)]
    values = []
    for v, i in anchors:
        others = [(w, j) for w, j in everything if (w, j) != (v, i)]
        similar = torch.stack([features[i, v] @ features[j, w] / temperature for w, j in others])
        weight = torch.stack([positives[i, j] for _, j in others]).double()
        log_probability = similar - similar.logsumexp(0)
        values.append(-(weight * log_probability).sum() / weight.sum() * temperature / base_temperature)
    return torch.stack(values).view(-1, count).float()


def statistics(x):
    """Mean and biased variance of each channel."""
    rows = x.double().transpose(0, 1).flatten(1)
    mean = rows.sum(1) / rows.shape[1]
    return mean, ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]


def distance(bn, mean, var):
    return ((bn.running_var - var) ** 2).sum().sqrt() + ((bn.running_mean - mean) ** 2).sum().sqrt()
