"""Supervised contrastive loss (Khosla et al., NeurIPS 2020), with the arguments of SupContrast and its copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.compat._common import floating, positive


class SupervisedContrast(nn.Module):
    """The loss of ``ContrastLoss`` and ``SupConLoss``. Anchor views are all views, or only the first in mode "one"."""

    def __init__(self, temperature: float = 0.07, contrast_mode: str = "all", base_temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = contrast_mode
        self.base_temperature = base_temperature

    def contrast(
        self,
        features: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
        *,
        reduction: str,
        return_logits: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss, and the similarities divided by the temperature if requested.

        Args:
            features: (N, views, ...), not normalized here.
            labels: (N,); samples with the same label are positives of each other.
            mask: (N, N), instead of labels: the weight of the column's sample as a positive of the row's sample.
                Without labels and mask, a sample's positives are its other views.
            reduction: "mean", or "none" for one loss per anchor, (anchor views, N).
            return_logits: also return the (anchor views * N, views * N) similarities.

        Raises:
            ValueError: features have fewer than three dimensions; both labels and mask are given; the number of labels
                is not N; the mode is unknown.
            IndexError: N = 0.
        """
        if features.ndim < 3:
            raise ValueError(f"`features` needs to be [bsz, n_views, ...], got {tuple(features.shape)}")
        if labels is not None and mask is not None:
            raise ValueError("Cannot define both `labels` and `mask`")
        features = features.flatten(2)
        count, views, _ = features.shape
        temperature, mode = self.temperature, self.contrast_mode
        pairs = labels is None and mask is None and views == 2 and mode in ("all", "one") and not return_logits
        if pairs and floating(features, 3) and count > 0 and positive(temperature):
            loss = ops.contrastive_loss(
                *features.unbind(1),
                temperature=temperature,
                symmetric=mode == "all",
                normalize=False,
                reduction="mean" if reduction == "mean" else "none",
            )
            if temperature != self.base_temperature:
                loss = loss * (temperature / self.base_temperature)
            return (loss if reduction == "mean" else loss.view(-1, count)), None
        positives = _positives(features, labels, mask)
        if mode not in ("all", "one"):
            raise ValueError(f"Unknown mode: {mode}")
        if count == 0:
            raise IndexError(f"there is no sample in features {tuple(features.shape)}")
        vectors = features.transpose(0, 1).flatten(0, 1)
        anchor_views = views if mode == "all" else 1
        similarity = vectors[: anchor_views * count] @ vectors.T / temperature
        # This term excludes each anchor from its sum. It is finite, because 0 * inf would be NaN.
        itself = torch.zeros_like(similarity).fill_diagonal_(torch.finfo(similarity.dtype).min / 2)
        positives = positives.repeat(anchor_views, views).fill_diagonal_(0)
        log_likelihood = (positives * (similarity + itself).log_softmax(1)).sum(1) / positives.sum(1)
        loss = (-(temperature / self.base_temperature) * log_likelihood).view(anchor_views, count)
        return (loss.mean() if reduction == "mean" else loss), similarity


def _positives(features: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the mask of positives, (N, N), float32, on the device of features."""
    count, device = features.shape[0], features.device
    if mask is not None:
        return mask.to(device, torch.float32)
    if labels is None:
        return torch.eye(count, device=device)
    labels = labels.flatten()
    if labels.shape[0] != count:
        raise ValueError(f"Num of labels does not match num of features: {labels.shape[0]} and {count}")
    return (labels[:, None] == labels).to(device, torch.float32)
