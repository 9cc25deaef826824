"""Trainable heads that are used in distillation and not exported."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Sequential):
    """Projection head of two linear layers with a ReLU in between (paper, Eq. 8).

    Args:
        in_features: width of the penultimate features and of the hidden layer.
        out_features: width D of the space in which teacher and student are compared.
    """

    def __init__(self, in_features: int, out_features: int = 128) -> None:
        super().__init__(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, out_features))

    def forward(self, features: Tensor) -> Tensor:
        """Project features (N, in_features) to (N, out_features), with the dtype of the weights.

        Raises:
            RuntimeError: the features do not have in_features columns or the dtype of the weights.
        """
        return super().forward(features)
