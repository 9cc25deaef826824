"""Losses and hooks of DataFree: CMI, Fast-Datafree, NAYER and their descendants.

The originals are ``datafree/criterions.py``, ``datafree/hooks.py`` and ``datafree/synthesis/contrastive.py`` of
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
    Case("kldiv", "logits (N, classes) of one shape, any reduction", "distillation_kl"),
    Case("kldiv", "other shapes, such as maps of logits", None),
    Case("KLDiv", "logits (N, classes) of one shape, any reduction", "distillation_kl"),
    Case("KLDiv", "other shapes, such as maps of logits", None),
    Case("jsdiv", "always", None),
    Case("cross_entropy", "always", None),
    Case("class_balance_loss", "always", None),
    Case("onehot_loss", "always", None),
    Case("get_image_prior_losses", "always", None),
    Case("DeepInversionHook", "maps (N, C, H, W)", "statistics_distance"),
    Case("DeepInversionHook", "maps (N, C, H, W), with mmt_rate", "channel_statistics"),
    Case("FeatureMeanVarHook", "always", None),  # PyTorch has one kernel for it; an op takes longer to call
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


def kldiv(logits: Tensor, targets: Tensor, T: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """KL(softmax(targets / T) || softmax(logits / T)) times T squared.

    Args:
        logits: (N, classes, ...), the student's.
        targets: likewise, the teacher's logits.
        T: the temperature.
        reduction: as that of ``torch.nn.functional.kl_div``; "none" is one value an element.
    """
    return softened_kl(logits, targets, T, reduction)


class KLDiv(nn.Module):
    """:func:`kldiv` as a module, of the same arguments."""

    def __init__(self, T: float = 1.0, reduction: str = "batchmean") -> None:
        super().__init__()
        self.T = T
        self.reduction = reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits of student and teacher, (N, classes, ...), to their divergence."""
        return kldiv(logits, targets, T=self.T, reduction=self.reduction)


def jsdiv(logits: Tensor, targets: Tensor, T: float = 1.0, reduction: str = "batchmean") -> Tensor:
    """Half of KL(M || P) + KL(M || Q), with M the mean of the softened probabilities P and Q, all within [0.01, 0.99].

    Arguments as those of :func:`kldiv`; not times T squared. M || P rather than P || M is the original's order.
    """
    p = F.softmax(logits / T, dim=1)
    q = F.softmax(targets / T, dim=1)
    m = (0.5 * (p + q)).clamp(0.01, 0.99)
    # Half of both divergences is the one to the mean of both logarithms.
    log_p, log_q = (x.clamp(0.01, 0.99).log() for x in (p, q))
    return kl_div(0.5 * (log_p + log_q), m, reduction)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.cross_entropy`` of logits (N, classes) and labels (N,)."""
    return F.cross_entropy(logits, targets, reduction=reduction)


def class_balance_loss(logits: Tensor) -> Tensor:
    """Minus the entropy of the mean class probabilities of logits (N, classes) (DAFL)."""
    mean = logits.softmax(1).mean(0)
    return (mean * mean.log()).sum()


def onehot_loss(logits: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (N, classes) to labels (N,), without them to their own largest class (DAFL)."""
    return cross_entropy(logits, logits.max(1)[1] if targets is None else targets)


def get_image_prior_losses(inputs_jit: Tensor) -> Tensor:
    """Total variation of images (N, C, H, W): the mean absolute differences in four directions, summed."""
    return torch.stack([d.abs().mean() for d in differences(inputs_jit)]).sum()


class _Hook:
    """A forward hook on a module, which it keeps.

    Attributes:
        hook: the handle.
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.hook = module.register_forward_hook(self.hook_fn)
        self.module = module

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        """Take the hook off the module."""
        self.hook.remove()


class _NamedHook(_Hook):
    def __repr__(self) -> str:
        return f"<Feature Hook>: {self.module}"


class FeatureHook(_NamedHook):
    """Keeps what a module is given and gives, as ``input`` and ``output``."""

    input: Tensor
    output: Any

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.output = output
        self.input = input[0]


class InstanceMeanHook(_NamedHook):
    """Keeps the mean over positions of the maps (N, C, H, W) that a module is given, as ``instance_mean`` (N, C)."""

    instance_mean: Tensor

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        self.instance_mean = input[0].mean([2, 3])


class FeatureMeanHook(InstanceMeanHook):
    """As :class:`InstanceMeanHook`; the originals have both."""


class FeatureMeanVarHook(_Hook):
    """Keeps mean and unbiased variance of a module's maps, as ``mean`` and ``var``.

    Args:
        module: the module.
        on_input: of what it is given, or else of what it gives.
        dim: the dimensions that are averaged over.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, module: nn.Module, on_input: bool = True, dim: int | Sequence[int] = (0, 2, 3)) -> None:
        super().__init__(module)
        self.on_input = on_input
        self.dim = dim if isinstance(dim, int) else list(dim)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Any) -> None:
        # A copy: what follows may change the features in place, and backward needs them as they were.
        features = (input[0] if self.on_input else output).clone()
        self.var, self.mean = torch.var_mean(features, dim=self.dim, unbiased=True)

    def remove(self) -> None:
        """Take the hook off the module."""
        super().remove()
        self.output = None


def register_hooks(modules: Iterable[nn.Module]) -> list[FeatureHook]:
    """One :class:`FeatureHook` a module."""
    return [FeatureHook(module) for module in modules]


class DeepInversionHook(_Hook):
    """Compares what a BatchNorm is given with what it has stored, at each forward of it.

    Args:
        module: with ``running_mean`` and ``running_var`` (C,), given maps (N, C, H, W).
        mmt_rate: None as in CMI. With a rate, as in Fast-Datafree and NAYER, what is compared is the batch's statistics
            times (1 - mmt_rate) plus the kept ones times mmt_rate, once :meth:`update_mmt` has kept some.

    Attributes:
        r_feature: after a forward, ``||running_var - var|| + ||running_mean - mean||``, var biased; a scalar,
            differentiable in the input.
        mmt: the kept mean and variance; None before :meth:`update_mmt`.
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
            mean, var = self._smoothed(mean, var)
        self.r_feature = distance(module.running_mean.detach(), module.running_var.detach(), mean, var)

    def _smoothed(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mmt is not None
        assert self.mmt_rate is not None
        kept_mean, kept_var = self.mmt
        # Not torch.lerp, which wants both of one dtype.
        new = 1 - self.mmt_rate
        return self.mmt_rate * kept_mean + new * mean, self.mmt_rate * kept_var + new * var

    def update_mmt(self) -> None:
        """Keep the statistics of the last input: the first as they are, later ones smoothed into the kept.

        Raises:
            AttributeError: there is no rate; CMI's hook, without one, has no such method.
            TypeError: there was no input yet.
        """
        if self.mmt_rate is None:
            raise AttributeError("DeepInversionHook was made without mmt_rate and keeps no statistics")
        if self.tmp_val is None:
            raise TypeError("update_mmt needs a forward of the hooked module first")
        mean, var = (value.detach() for value in self.tmp_val)
        self.mmt = (mean, var) if self.mmt is None else self._smoothed(mean, var)


class ContrastLoss(SupervisedContrast):
    """Supervised contrastive loss, one value an anchor; without labels and mask that of SimCLR.

    The features are compared as they are; CMI's head normalises them.

    Args:
        temperature: of the similarities.
        contrast_mode: "all" views are anchors, or the first "one".
        base_temperature: the loss is scaled by temperature / base_temperature.
    """

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        return_logits: bool = False,
    ) -> Any:
        """Features (N, views, ...), and labels (N,) or a mask (N, N) of positives, to (anchor views, N).

        With ``return_logits`` a pair of that and the similarities over the temperature, (anchor views * N, views * N).

        Raises:
            ValueError: fewer than three dimensions; labels and mask; labels of another number; an unknown mode.
            IndexError: N = 0.
        """
        loss, logits = self.contrast(features, labels, mask, reduction="none", return_logits=return_logits)
        return (loss, logits) if return_logits else loss
