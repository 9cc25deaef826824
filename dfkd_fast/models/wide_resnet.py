"""Wide residual networks (Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016).

WRN-d-k has (d - 4) / 6 blocks a stage and k times the channels 16, 32, 64. Blocks are pre-activated: BatchNorm, ReLU,
convolution, twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideResNet"]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(drop_rate)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        y = self.conv2(self.dropout(self.relu2(self.bn2(self.conv1(activated)))))
        # Where the shape changes, the shortcut too starts from the activated input (as in the paper's code).
        return y + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-depth-width for images of any size, (N, 3, H, W) to logits (N, num_classes).

    Args:
        depth: number of layers, 6 n + 4.
        width: k, the factor by which the channels are widened.
        num_classes: number of classes.
        widths: channels of the stem and of the three stages, in place of 16, 16 k, 32 k, 64 k.
        drop_rate: dropout between a block's two convolutions.
        stem_stride: stride of the first convolution: 1 as published for 32 x 32; more for large images.

    Raises:
        ValueError: a depth that is not 6 n + 4, or a width below 1.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        *,
        num_classes: int,
        widths: Sequence[int] | None = None,
        drop_rate: float = 0.0,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n of at least 1 (10, 16, 22, 28, 34, 40, ...), got {depth}")
        if widths is None:
            widths = (16, 16 * width, 32 * width, 64 * width)
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"widths must be four positive numbers, of the stem and three stages, got {widths}")
        blocks = (depth - 4) // 6

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            first = _Block(inputs, outputs, stride, drop_rate)
            return nn.Sequential(first, *(_Block(outputs, outputs, 1, drop_rate) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.block1 = stage(widths[0], widths[1], 1)
        self.block2 = stage(widths[1], widths[2], 2)
        self.block3 = stage(widths[2], widths[3], 2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(self.relu(self.bn(x)), 1)
        return self.fc(x.flatten(1))
