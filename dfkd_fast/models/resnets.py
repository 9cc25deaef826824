"""Residual networks for small images.

* ResNet-d, with d layers (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2): three
  stages of (d - 2) / 6 basic blocks. ``x4`` in a name means 32 channels in the stem, then 64, 128 and 256, as in the
  distillation literature.
* WRN-d-k, with d layers (Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016): three stages of (d - 4) / 6
  pre-activated blocks with 16 k, 32 k and 64 k channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CifarResNet", "WideResNet"]


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


class _WideBlock(nn.Module):
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
        # A convolutional shortcut reads the activated input, as in the paper's code.
        return y + (x if self.shortcut is None else self.shortcut(activated))


def _stages(
    block: Callable[[int, int, int], nn.Module], blocks: int, widths: Sequence[int]
) -> tuple[nn.Sequential, nn.Sequential, nn.Sequential]:
    """Three stages; the second and the third halve the resolution."""

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1)))

    return stage(widths[0], widths[1], 1), stage(widths[1], widths[2], 2), stage(widths[2], widths[3], 2)


def _checked(widths: Sequence[int]) -> Sequence[int]:
    if len(widths) != 4 or min(widths) < 1:
        raise ValueError(f"widths must be four positive numbers, of the stem and three stages, got {widths}")
    return widths


def _initialize(model: nn.Module, head: nn.Linear) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(head.bias)


class CifarResNet(nn.Module):
    """ResNet-d with a 3 x 3 stem. It maps images (N, 3, H, W) of any size to logits (N, num_classes).

    Args:
        depth: number of layers, 6 n + 2 for n blocks per stage.
        num_classes: number of classes.
        widths: channels of the stem and of the three stages.
        stem_stride: stride of the first convolution; 1 is the published network for 32 x 32 images.

    Raises:
        ValueError: depth is not 6 n + 2, or widths are not four positive numbers.
    """

    def __init__(
        self, depth: int, *, num_classes: int, widths: Sequence[int] = (16, 16, 32, 64), stem_stride: int = 1
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 with n of at least 1 (8, 14, 20, 26, 32, ...), got {depth}")
        widths = _checked(widths)
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.layer1, self.layer2, self.layer3 = _stages(_BasicBlock, (depth - 2) // 6, widths)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialize(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class WideResNet(nn.Module):
    """WRN-d-k. It maps images (N, 3, H, W) of any size to logits (N, num_classes).

    Args:
        depth: number of layers, 6 n + 4 for n blocks per stage.
        width: k, the factor by which the channels of the stages are multiplied.
        num_classes: number of classes.
        widths: channels of the stem and of the three stages; None is (16, 16 k, 32 k, 64 k).
        drop_rate: dropout between the two convolutions of a block.
        stem_stride: stride of the first convolution; 1 is the published network for 32 x 32 images.

    Raises:
        ValueError: depth is not 6 n + 4, or widths are not four positive numbers.
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
        widths = _checked((16, 16 * width, 32 * width, 64 * width) if widths is None else widths)
        self.conv1 = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)

        def block(inputs: int, outputs: int, stride: int) -> nn.Module:
            return _WideBlock(inputs, outputs, stride, drop_rate)

        self.block1, self.block2, self.block3 = _stages(block, (depth - 4) // 6, widths)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        _initialize(self, self.fc)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(self.relu(self.bn(x)), 1)
        return self.fc(x.flatten(1))
