"""Losses of torchdistill on logits and activation maps (torchdistill 1.1, ``losses/mid_level.py``).

If torchdistill is installed, importing this module replaces both losses in its registry, so configurations with ``key:
'KDLoss'`` use them. The ``dependencies`` list of a configuration can import the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_fast.compat import Case
from dfkd_fast.compat._common import activation_map, softened_kl

__all__ = ["COVERAGE", "ATLoss", "KDLoss"]

COVERAGE = (
    Case("KDLoss", "two (N, classes) tensors of logits, any reduction", "distillation_kl"),
    Case("KDLoss", "two (N, classes) tensors of logits, with targets", "distillation_kl"),
    Case("KDLoss", "other shapes, such as maps of logits", None),
    Case("ATLoss", "always", None),
)


def _registry() -> Callable[[type[nn.Module]], Any] | None:
    """Return torchdistill's registration function, or None if torchdistill is not installed."""
    try:
        # Importing mid_level registers torchdistill's losses, so the import must come before their replacement.
        from torchdistill.losses import mid_level, registry
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "torchdistill":
            return None
        raise
    assert mid_level is not None
    return registry.register_mid_level_loss


class KDLoss(nn.KLDivLoss):
    """Distillation loss on logits (Hinton et al., arXiv:1503.02531), with or without labels.

    With labels::

        alpha * cross_entropy(student, targets) + beta * temperature^2 * KL(teacher || student)

    Without labels, or if alpha is None or 0, the loss is KL(teacher || student).

    Args:
        student_module_path: path of the student module with the logits.
        student_module_io: "input" or "output" of that module.
        teacher_module_path: path of the teacher module with the logits.
        teacher_module_io: "input" or "output" of that module.
        temperature: temperature of both softmaxes.
        alpha: weight of the cross entropy.
        beta: weight of the divergence; by default 1 - alpha.
        reduction: reduction of both terms, as in ``torch.nn.functional.kl_div``; the cross entropy uses "mean" for
            "batchmean".
        **kwargs: arguments of ``torch.nn.CrossEntropyLoss``.

    Raises:
        TypeError: alpha and beta are both None, or ``CrossEntropyLoss`` does not accept an argument.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(reduction=reduction)
        if alpha is None and beta is None:
            raise TypeError("alpha or beta must be a number: beta is 1 - alpha by default")
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - alpha if beta is None and alpha is not None else beta
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(  # type: ignore[override]
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss from the recorded inputs and outputs of modules, logits (N, classes), and labels (N,).

        Raises:
            KeyError: a module, or its "input" or "output", is missing.
        """
        student = student_io_dict[self.student_module_path][self.student_module_io]
        teacher = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        if self.alpha is None or self.alpha == 0 or targets is None:
            return softened_kl(student, teacher, self.temperature, self.reduction, squared=False)
        assert self.beta is not None
        soft = softened_kl(student, teacher, self.temperature, self.reduction)
        return self.alpha * self.cross_entropy_loss(student, targets) + self.beta * soft


class ATLoss(nn.Module):
    """Attention transfer between pairs of maps (N, C, H, W) (Zagoruyko and Komodakis, ICLR 2017).

    Args:
        at_pairs: for each pair, ``student`` and ``teacher`` with the ``path`` and ``io`` of a map, and optionally a
            ``weight`` (default 1).
        mode: "code" for the mean squared difference of normalized maps, "paper" for its L2 norm, averaged over N.
        **kwargs: unused.

    Raises:
        ValueError: the mode is unknown.
    """

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **kwargs: Any) -> None:
        super().__init__()
        self.at_pairs = at_pairs
        self.mode = mode
        if mode not in ("code", "paper"):
            raise ValueError(f"mode `{mode}` is not expected")

    @staticmethod
    def attention_transfer_paper(feature_map: Tensor) -> Tensor:
        """Return the sum of squares over channels of (N, C, H, W), as unit rows (N, H W)."""
        return F.normalize(feature_map.square().sum(1).flatten(1))

    def compute_at_loss_paper(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        """Return the L2 norm of the difference of attention maps of (N, C, H, W), summed over N."""
        student, teacher = map(self.attention_transfer_paper, (student_feature_map, teacher_feature_map))
        return torch.linalg.vector_norm(student - teacher, dim=1).sum()

    @staticmethod
    def attention_transfer(feature_map: Tensor) -> Tensor:
        """Return the mean of squares over channels of (N, C, H, W), as unit rows (N, H W)."""
        return activation_map(feature_map, 2)

    def compute_at_loss(self, student_feature_map: Tensor, teacher_feature_map: Tensor) -> Tensor:
        """Return the mean squared difference of attention maps of (N, C, H, W)."""
        student, teacher = map(self.attention_transfer, (student_feature_map, teacher_feature_map))
        return (student - teacher).square().mean()

    def forward(
        self,
        student_io_dict: Mapping[str, Mapping[str, Tensor]],
        teacher_io_dict: Mapping[str, Mapping[str, Tensor]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compute the weighted sum over pairs from the recorded inputs and outputs of modules, (N, C, H, W).

        Raises:
            KeyError: a module, or its "input" or "output", is missing.
        """
        total: Any = 0
        batch_size: Any = None
        for pair in self.at_pairs.values():
            student, teacher = (
                io_dict[pair[side]["path"]][pair[side]["io"]]
                for side, io_dict in (("student", student_io_dict), ("teacher", teacher_io_dict))
            )
            compare = self.compute_at_loss_paper if self.mode == "paper" else self.compute_at_loss
            total = total + pair.get("weight", 1) * compare(student, teacher)
            batch_size = len(student) if batch_size is None else batch_size
        return total / batch_size if self.mode == "paper" else total


_register = _registry()
if _register is not None:
    _register(KDLoss)
    _register(ATLoss)
