"""Residual networks for small images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, 4.2).

ResNet-d has (d - 2) / 6 basic blocks in each of three stages. The names with ``x4`` are the wide ones of the literature
on distillation: 32 channels in the stem, then 64, 128 and 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet"]


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs or stride != 1:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-depth with a 3 x 3 stem, for images of any size, (N, 3, H, W) to logits (N, num_classes).

    Args:
        depth: number of layers, 6 n + 2.
        num_classes: number of classes.
        widths: channels of the stem and of the three stages.
        stem_stride: stride of the first convolution: 1 as published for 32 x 32; more for large images.

    Raises:
        ValueError: a depth that is not 6 n + 2, or widths that are not four positive numbers.
    """

    def __init__(
        self, depth: int, *, num_classes: int, widths: Sequence[int] = (16, 16, 32, 64), stem_stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n of at least 1 (8, 14, 20, 26, 32, ...), got {depth}")
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must be four positive numbers, of the stem and three stages, got {widths}")
        blocks = (depth - 2) // 6

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = _BasicBlock(inputs, outputs, stride)
            return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(widths[0], widths[1], 1)
        self.layer2 = stage(widths[1], widths[2], 2)
        self.layer3 = stage(widths[2], widths[3], 2)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
