"""Losses and hooks of DataFree and its descendants CMI, Fast-Datafree and NAYER.

The originals are ``datafree/criterions.py``, ``datafree/hooks.py`` and ``datafree/synthesis/contrastive.py`` in
zju-vipa/CMI, zju-vipa/Fast-Datafree and tmtuan1307/NAYER.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import differences, distance, input_distance, input_statistics, kl_div, softened_kl
from dfkd_fast.compat._contrast import SupervisedContrast

__all__ = [
    "COVERAGE",
    "ContrastLoss",
    "DeepInversionHook",
    "FeatureHook",
    "FeatureMeanHook",
    "FeatureMeanVarHook",
    "InstanceMeanHook",
    "KLDiv",
    "class_balance_loss",
    "cross_entropy",
    "get_image_prior_losses",
    "jsdiv",
    "kldiv",
    "onehot_loss",
    "register_hooks",
]

COVERAGE = (
    Case("kldiv", "two (N, classes) tensors of logits, any reduction", "distillation_kl"),
    Case("kldiv", "other shapes, such as maps of logits", None),
    Case("KLDiv", "two (N, classes) tensors of logits, any reduction", "distillation_kl"),
    Case("KLDiv", "other shapes, such as maps of logits", None),
    Case("jsdiv", "always", None),
    Case("cross_entropy", "always", None),
    Case("class_balance_loss", "always", None),
    Case("onehot_loss", "always", None),
    Case("get_image_prior_losses", "always", None),
    Case("DeepInversionHook", "maps (N, C, H, W)", "statistics_distance"),
    Case("DeepInversionHook", "maps (N, C, H, W), with mmt_rate", "channel_statistics"),
    Case("FeatureMeanVarHook", "always", None),  # one PyTorch kernel computes it with less overhead than an op
    Case("FeatureHook", "always", None),
    Case("InstanceMeanHook", "always", None),
    Case("FeatureMeanHook", "always", None),
    Case("ContrastLoss", 'two views, no labels, no mask, contrast_mode "all"', "contrastive_loss"),
    Case("ContrastLoss", 'two views, no labels, no mask, contrast_mode "one"', "contrastive_loss"),
    Case("ContrastLoss", "labels", None),
    Case("ContrastLoss", "mask", None),
    Case("ContrastLoss", "another number of views", None),
    Case("ContrastLoss", "return_logits", None),
)
"""The op that computes each kind of call; None for plain PyTorch."""


def kldiv(logits: Tensor, targets: Tensor, T: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """Compute KL(softmax(targets / T) || softmax(logits / T)) times T squared (Hinton et al., arXiv:1503.02531).

    Args:
        logits: the student's logits, (N, classes, ...), any floating dtype.
        targets: the teacher's logits, with the same shape.
        T: temperature.
        reduction: as in ``torch.nn.functional.kl_div``.

    Raises:
        RuntimeError: the shapes cannot be broadcast.
        IndexError: the logits have fewer than two dimensions.
        ValueError: the reduction is unknown.
    """
    return softened_kl(logits, targets, T, reduction)


class KLDiv(nn.Module):
    """:func:`kldiv` as a module, with the same arguments and errors."""

    def __init__(self, T: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        self.T = T
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the divergence of the logits of student and teacher, (N, classes, ...), any floating dtype."""
        return kldiv(logits, targets, T=self.T, reduction=self.reduction)


def jsdiv(logits: Tensor, targets: Tensor, T: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """Compute (KL(M || P) + KL(M || Q)) / 2 for softened probabilities P and Q and their mean M (CMI).

    As in the original, the divergences are KL(M || P), where the Jensen-Shannon divergence has KL(P || M). P, Q and M
    are clamped to [0.01, 0.99], and the result is not multiplied by T squared. Arguments and errors are those of
    :func:`kldiv`.
    """
    p = F.softmax(logits / T, dim=1)
    q = F.softmax(targets / T, dim=1)
    m = (0.5 * (p + q)).clamp(0.01, 0.99)
    # The mean of both divergences is the divergence from the mean logarithm.
    log_p, log_q = (x.clamp(0.01, 0.99).log() for x in (p, q))
    return kl_div(0.5 * (log_p + log_q), m, reduction)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return ``torch.nn.functional.cross_entropy`` of logits (N, classes), any floating dtype, and int64 labels (N,).

    Raises:
        ValueError: the batch sizes differ, or the reduction is unknown.
    """
    return F.cross_entropy(logits, targets, reduction=reduction)


def class_balance_loss(logits: Tensor) -> Tensor:
    """Return the negative entropy of mean class probabilities (Chen et al., ICCV 2019).

    Args:
        logits: (N, classes), any floating dtype.

    Raises:
        IndexError: logits have fewer than two dimensions.
    """
    mean = logits.softmax(1).mean(0)
    return (mean * mean.log()).sum()


def onehot_loss(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of logits with labels or with their own argmax (Chen et al., ICCV 2019).

    Args:
        logits: (N, classes), any floating dtype.
        targets: labels (N,), int64; by default the argmax of the logits.

    Raises:
        ValueError: the batch sizes differ.
    """
    return cross_entropy(logits, logits.max(1)[1] if targets is None else targets)


def get_image_prior_losses(inputs_jit: Tensor) -> Tensor:
    """Return the total variation: the sum of mean absolute differences in four directions (Yin et al., CVPR 2020).

    Args:
        inputs_jit: images (N, C, H, W), any floating dtype.

    Raises:
        IndexError: images have fewer than four dimensions.
    """
    return torch.stack([d.abs().mean() for d in differences(inputs_jit)]).sum()


class _Hook:
    """A forward hook on a module.

    Attributes:
        hook: handle of the hook.
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.hook_fn)
        self.module = module

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        """Remove the hook from the module."""
        self.hook.remove()


class _NamedHook(_Hook):
    def __repr__(self) -> str:
        return f"<Feature Hook>: {self.module}"


class FeatureHook(_NamedHook):
    """Stores the first input and the output of a module, as ``input`` and ``output``."""

    input: Tensor
    output: Any

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.output = output
        self.input = input[0]


class InstanceMeanHook(_NamedHook):
    """Stores the mean over positions of a module's input (N, C, H, W), as ``instance_mean`` (N, C)."""

    instance_mean: Tensor

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.instance_mean = input[0].mean([2, 3])


class FeatureMeanHook(InstanceMeanHook):
    """Same as :class:`InstanceMeanHook`; the originals have both."""


class FeatureMeanVarHook(_Hook):
    """Stores mean and unbiased variance of a module's features, as ``mean`` and ``var``.

    Args:
        module: the module.
        on_input: use the module's input instead of its output.
        dim: dimensions to average over.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, module: nn.Module, on_input: bool = True, dim: int | Sequence[int] = (0, 2, 3)) -> None:
        super().__init__(module)
        self.on_input = on_input
        self.dim = dim if isinstance(dim, int) else list(dim)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        # Cloned, because later modules may change the features in place before backward reads them.
        features = (input[0] if self.on_input else output).clone()
        self.var, self.mean = torch.var_mean(features, dim=self.dim, unbiased=True)

    def remove(self) -> None:
        """Remove the hook from the module."""
        super().remove()
        self.output = None  # as the originals do; nothing reads it


def register_hooks(modules: Iterable[nn.Module]) -> list[FeatureHook]:
    """Return one :class:`FeatureHook` per module."""
    return [FeatureHook(module) for module in modules]


class DeepInversionHook(_Hook):
    """Compares batch statistics of a BatchNorm's input with its running statistics in each forward.

    Args:
        module: a module with ``running_mean`` and ``running_var`` (C,) and inputs (N, C, H, W).
        mmt_rate: None as in CMI. With a rate, as in Fast-Datafree and NAYER, the batch statistics are first averaged
            with those stored by :meth:`update_mmt`, which have weight mmt_rate.

    Attributes:
        r_feature: ``||running_var - var|| + ||running_mean - mean||`` of the last forward, with biased var; a scalar,
            differentiable with respect to the input (Yin et al., CVPR 2020, Eq. 4).
        mmt: the stored mean and variance; None before :meth:`update_mmt`.
        tmp_val: mean and variance of the last input; None without a rate.
    """

    r_feature: Tensor

    def __init__(self, module: nn.Module, mmt_rate: float | None = None) -> None:
        super().__init__(module)
        self.mmt_rate = mmt_rate
        self.mmt: tuple[Tensor, Tensor] | None = None
        self.tmp_val: tuple[Tensor, Tensor] | None = None

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        if self.mmt_rate is None:
            self.r_feature = input_distance(input[0], module.running_mean, module.running_var)
            return
        self.tmp_val = mean, var = input_statistics(input[0])
        if self.mmt is not None:
            mean, var = self._averaged(mean, var)
        self.r_feature = distance(module.running_mean.detach(), module.running_var.detach(), mean, var)

    def _averaged(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mmt is not None
        assert self.mmt_rate is not None
        old_mean, old_var = self.mmt
        # torch.lerp would need both operands in the same dtype.
        new = 1 - self.mmt_rate
        return self.mmt_rate * old_mean + new * mean, self.mmt_rate * old_var + new * var

    def update_mmt(self) -> None:
        """Store the statistics of the last input, averaged with those stored before.

        Raises:
            AttributeError: mmt_rate is None; CMI's hook does not have this method.
            TypeError: the module has not run yet.
        """
        if self.mmt_rate is None:
            raise AttributeError("DeepInversionHook has no mmt_rate and stores no statistics")
        if self.tmp_val is None:
            raise TypeError("update_mmt requires a forward of the hooked module first")
        mean, var = (value.detach() for value in self.tmp_val)
        self.mmt = (mean, var) if self.mmt is None else self._averaged(mean, var)


class ContrastLoss(SupervisedContrast):
    """Supervised contrastive loss (Khosla et al., 2020) per anchor; without labels and mask, the loss of SimCLR.

    The features are not normalized here; CMI's head normalizes them.

    Args:
        temperature: temperature of the similarities.
        contrast_mode: "all" uses all views as anchors, "one" the first.
        base_temperature: the loss is scaled by temperature / base_temperature.
    """

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        return_logits: bool = False,
    ) -> Any:
        """Compute the losses, (anchor views, N), of float features (N, views, ...) and labels (N,) or a mask (N, N).

        With ``return_logits``, also return similarities / temperature, (anchor views * N, views * N).

        Raises:
            ValueError: features have fewer than three dimensions, both labels and mask are given, the number of labels
                is not N, or the mode is unknown.
            IndexError: N = 0.
        """
        loss, logits = self.contrast(features, labels, mask, reduction="none", return_logits=return_logits)
        return (loss, logits) if return_logits else loss
