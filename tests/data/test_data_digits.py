"""The digits: split and pixels."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from dfkd_fast.config import DataConfig
from dfkd_fast.data import ImageArray, load


def config(**changes: object) -> DataConfig:
    return DataConfig(name="digits", **({"image_size": 32} | changes))  # type: ignore[arg-type]


def test_split_is_complete_stratified_and_seeded() -> None:
    data, again, other = load(config(image_size=8)), load(config(image_size=8)), load(config(image_size=8, seed=1))
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    scans = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.int64)
    total = torch.bincount(torch.from_numpy(load_digits().target))
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    assert torch.equal(train + test, total)
    assert (test - 0.2 * total).abs().max() <= 1
    both = torch.cat([data.train.images, data.test.images])[:, 0].to(torch.int64)  # 8 pixels: not enlarged
    assert torch.equal(both.flatten(1).sum(1).sort()[0], scans.flatten(1).sum(1).sort()[0])
    assert torch.equal(torch.unique(both, dim=0), torch.unique(scans, dim=0))
    assert torch.equal(data.test.images, again.test.images)
    assert not torch.equal(data.test.images, other.test.images)


@pytest.mark.parametrize("size", [16, 32, 45])
def test_images_are_enlarged_scans(size: int) -> None:
    data = load(config(image_size=size, augment=False))
    image, label = data.train[0]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert torch.equal(image[0], image[1])
    assert image.min() >= -1
    assert image.max() <= 1
    scans = torch.from_numpy(load_digits().images).to(torch.float32)
    large = torch.nn.functional.interpolate(scans[:, None], (size, size), mode="bilinear")[:, 0] / 8 - 1
    nearest = (large - image[0]).abs().amax(dim=(1, 2)).min()
    assert nearest <= 1 / 255 + 1e-6  # half a level of uint8


def test_only_training_images_are_augmented() -> None:
    data = load(config())
    assert isinstance(data.train, ImageArray)
    torch.manual_seed(0)
    assert len({data.train[0][0].sum().item() for _ in range(20)}) > 1
    assert torch.equal(data.test[0][0], data.test[0][0])
    still = load(config(augment=False))
    assert torch.equal(still.train[0][0], still.train[0][0])
