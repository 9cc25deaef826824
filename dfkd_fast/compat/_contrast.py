"""Supervised contrastive loss (Khosla et al., NeurIPS 2020) as SupContrast and its copies call it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfkd_fast import ops
from dfkd_fast.compat._common import floating, positive

__all__ = ["contrast"]


def contrast(
    features: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    temperature: Any,
    base_temperature: Any,
    contrast_mode: str,
    reduction: str,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the similarities divided by the temperature if requested.

    Args:
        features: (N, views, ...), compared as they are, not normalised.
        labels: (N,); samples of one label are positives of each other.
        mask: (N, N), instead of labels; not zero where the column is a positive of the row. It may weigh them. With
            neither, the positives of a sample are its own other views.
        temperature: of the similarities.
        base_temperature: the loss is scaled by temperature / base_temperature.
        contrast_mode: "all" views are anchors, or the first "one".
        reduction: "mean", or "none" for (anchor views, N).
        return_logits: also return the (anchor views * N, views * N) similarities.

    Raises:
        ValueError: fewer than three dimensions; labels and mask; labels of another number; an unknown mode.
        IndexError: N = 0.
    """
    if features.ndim < 3:
        raise ValueError(f"`features` needs to be [bsz, n_views, ...], got {tuple(features.shape)}")
    if labels is not None and mask is not None:
        raise ValueError("Cannot define both `labels` and `mask`")
    features = features.flatten(2)
    count, views, _ = features.shape
    pairs = labels is None and mask is None and views == 2 and contrast_mode in ("all", "one") and not return_logits
    if pairs and floating(features, 3) and count > 0 and positive(temperature):
        first, second = features.unbind(1)
        loss = ops.contrastive_loss(
            first,
            second,
            temperature=temperature,
            symmetric=contrast_mode == "all",
            normalize=False,
            reduction="mean" if reduction == "mean" else "none",
        )
        if temperature != base_temperature:
            loss = loss * (temperature / base_temperature)
        return (loss if reduction == "mean" else loss.view(-1, count)), None
    positives = _positives(features, labels, mask)
    if contrast_mode not in ("all", "one"):
        raise ValueError(f"Unknown mode: {contrast_mode}")
    if count == 0:
        raise IndexError(f"there is no sample in features {tuple(features.shape)}")
    vectors = features.transpose(0, 1).flatten(0, 1)
    anchor_views = views if contrast_mode == "all" else 1
    similarity = vectors[: anchor_views * count] @ vectors.T / temperature
    # Out of every sum of exponentials; not infinite, since it is multiplied by zero.
    itself = torch.zeros_like(similarity).fill_diagonal_(torch.finfo(similarity.dtype).min / 2)
    positives = positives.repeat(anchor_views, views).fill_diagonal_(0)
    log_likelihood = (positives * (similarity + itself).log_softmax(1)).sum(1) / positives.sum(1)
    loss = (-(temperature / base_temperature) * log_likelihood).view(anchor_views, count)
    return (loss.mean() if reduction == "mean" else loss), similarity


def _positives(features: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """(N, N) in float32, on the device of features."""
    count, device = features.shape[0], features.device
    if mask is not None:
        return mask.to(device, torch.float32)
    if labels is None:
        return torch.eye(count, device=device)
    labels = labels.flatten()
    if labels.shape[0] != count:
        raise ValueError(f"Num of labels does not match num of features: {labels.shape[0]} and {count}")
    return (labels[:, None] == labels).to(device, torch.float32)
