"""scikit-learn's handwritten digits: 1,797 scans of 8 x 8 pixels. They are part of the installed package.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dfkd_fast.config import DataConfig
from dfkd_fast.data.image_data import HALF, ImageArray, ImageData
from dfkd_fast.data.registry import ImageSet, register

__all__ = ["Digits"]

TEST_SHARE = 0.2


@register("digits")
class Digits(ImageSet):
    """The digits, resized bilinearly to ``image_size``, with three equal channels in [-1, 1].

    The split, 1,437 training and 360 test images, is stratified by digit and drawn from ``config.seed``. Augmentation
    shifts training images by up to a sixteenth of their size and does not mirror them.
    """

    classes = 10

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        from sklearn.datasets import load_digits as read_digits  # slow to import
        from sklearn.model_selection import train_test_split

        scans = read_digits()
        labels = torch.from_numpy(scans.target).to(torch.int64)
        ink = torch.from_numpy(scans.images).to(torch.float32).unsqueeze(1) / 16  # pixels are 0 to 16
        size = config.image_size
        large = F.interpolate(ink, (size, size), mode="bilinear", align_corners=False)
        images = large.mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=TEST_SHARE, stratify=scans.target, random_state=config.seed
        )
        shift = size // 16 if config.augment else 0
        return ImageData(
            train=ImageArray(images[train], labels[train], shift=shift),
            test=ImageArray(images[test], labels[test]),
            classes=tuple(str(name) for name in scans.target_names),
            mean=HALF,
            std=HALF,
            image_size=size,
        )
