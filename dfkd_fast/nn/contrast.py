"""Semantic feature contrast of teacher and student features."""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.collectives import gather_columns
from dfkd_fast.nn.heads import ProjectionHead

__all__ = ["SemanticFeatureContrast"]


class SemanticFeatureContrast(nn.Module):
    """L_SFCL: contrastive loss between teacher and student features of the same images (paper, Eq. 8 and 9).

    Projection heads map the features to a common space, where :func:`dfkd_fast.ops.contrastive_loss` compares them. The
    heads train with the student; the teacher receives no gradient. In a run on several processes, the vectors of all
    processes are compared.

    Args:
        teacher_dim: width of the teacher's penultimate features.
        student_dim: width of the student's penultimate features.
        dim: width D of the common space.
        temperature: tau, greater than 0.
        symmetric: use the student's vectors as anchors too.
        shared: use one head for both networks, as the paper writes, instead of one per network.

    Attributes:
        teacher_head, student_head: :class:`ProjectionHead`, the same one if ``shared``.

    Raises:
        ValueError: a shared head is requested for features of different widths.
    """

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        dim: int = 128,
        temperature: float = 0.1,
        symmetric: bool = False,
        shared: bool = False,
    ) -> None:
        super().__init__()
        if shared and teacher_dim != student_dim:
            raise ValueError(
                "a shared head needs penultimate features of the same length, got "
                f"{teacher_dim} (teacher) and {student_dim} (student): use separate heads"
            )
        self.temperature, self.symmetric = temperature, symmetric
        self.teacher_head = ProjectionHead(teacher_dim, dim)
        self.student_head = self.teacher_head if shared else ProjectionHead(student_dim, dim)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Compute the loss, a float32 scalar, of features (N, teacher_dim) and (N, student_dim), any floating dtype.

        Raises:
            ValueError: the batch sizes differ, or the temperature is not positive.
            RuntimeError: the features do not have the heads' width or dtype.
        """
        anchors, positives = gather_columns(self.teacher_head(teacher.detach()), self.student_head(student))
        return ops.contrastive_loss(anchors, positives, temperature=self.temperature, symmetric=self.symmetric)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}"
