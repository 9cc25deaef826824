"""The scanned digits: their split and their pixels."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from dfkd_fast.config import DataConfig
from dfkd_fast.data import ImageArray, load


def config(**changes: object) -> DataConfig:
    return DataConfig(name="digits", **({"image_size": 32} | changes))  # type: ignore[arg-type]


def test_the_split_is_stratified_and_complete() -> None:
    data = load(config())
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert data.classes == tuple("0123456789")
    whole = torch.bincount(torch.from_numpy(load_digits().target))
    train, test = (torch.bincount(part.labels, minlength=10) for part in (data.train, data.test))
    assert torch.equal(train + test, whole)
    assert (test - 0.2 * whole).abs().max() <= 1


def test_every_scan_is_in_one_split() -> None:
    data = load(config(image_size=8))  # at 8 pixels nothing is enlarged
    scans = torch.from_numpy(load_digits().images).mul(255 / 16).round().to(torch.uint8)
    both = torch.cat([data.train.images, data.test.images])[:, 0]
    assert torch.equal(
        torch.sort(both.flatten(1).to(torch.int64).sum(1))[0], scans.flatten(1).to(torch.int64).sum(1).sort()[0]
    )
    assert torch.equal(torch.unique(both, dim=0), torch.unique(scans, dim=0))


def test_the_split_follows_from_the_seed() -> None:
    first, again, other = load(config()), load(config()), load(config(seed=1))
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


@pytest.mark.parametrize("size", [16, 32, 45])
def test_pixels_are_the_scan_enlarged(size: int) -> None:
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
    assert nearest <= 1 / 255 + 1e-6  # half a level of the bytes in between


def test_only_training_images_move() -> None:
    data = load(config())
    assert isinstance(data.train, ImageArray)
    torch.manual_seed(0)
    assert len({data.train[0][0].sum().item() for _ in range(20)}) > 1
    assert torch.equal(data.test[0][0], data.test[0][0])
    still = load(config(augment=False))
    assert torch.equal(still.train[0][0], still.train[0][0])
