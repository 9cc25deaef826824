"""The semantic feature contrast as a module of two feature tensors."""

from __future__ import annotations

from torch import Tensor, nn

from dfkd_fast import ops
from dfkd_fast.nn.heads import ProjectionHead

__all__ = ["SemanticFeatureContrast"]


class SemanticFeatureContrast(nn.Module):
    """L_SFCL (paper, Eq. 8, 9): the teacher's and the student's view of one image attract, all other views repel.

    A head a side brings both views into one space; the loss there is :func:`dfkd_fast.ops.contrastive_loss`. Both heads
    train with the student, and the teacher gets no gradient.

    Args:
        teacher_dim: width of the teacher's penultimate features.
        student_dim: width of the student's.
        dim: D, the width of the common space.
        temperature: tau, above 0.
        symmetric: the student's views are anchors too.

    Attributes:
        teacher_head, student_head: :class:`ProjectionHead`.
    """

    def __init__(
        self, teacher_dim: int, student_dim: int, dim: int = 128, temperature: float = 0.1, symmetric: bool = False
    ) -> None:
        super().__init__()
        self.temperature, self.symmetric = temperature, symmetric
        self.teacher_head = ProjectionHead(teacher_dim, dim)
        self.student_head = ProjectionHead(student_dim, dim)

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Features (N, teacher_dim) and (N, student_dim) of the same N images to a float32 scalar."""
        anchors, positives = self.teacher_head(teacher.detach()), self.student_head(student)
        return ops.contrastive_loss(anchors, positives, temperature=self.temperature, symmetric=self.symmetric)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, symmetric={self.symmetric}"
