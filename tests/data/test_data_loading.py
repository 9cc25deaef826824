"""``ImageArray``, ``loader`` and the registry of data sets."""

from __future__ import annotations

import multiprocessing.util
import re
import resource
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from dfkd_fast import data
from dfkd_fast.config import DataConfig
from dfkd_fast.data import ImageArray, ImageData, ImageSet, load, loader, num_classes, register

from ..engine import system_faults

MEAN, STD = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)


def array(count: int = 23, size: int = 12, shift: int = 0) -> ImageArray:
    images = torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
    )
    return ImageArray(images, torch.arange(count), mean=MEAN, std=STD, shift=shift)


class Noise(Dataset[tuple[Tensor, int]]):
    """Random items, fetched one by one."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.rand(3, 4, 4) + index, index


def batches(dataset: Dataset, passes: int = 2, **changes: object) -> list[list[tuple[Tensor, Tensor]]]:
    arguments: dict[str, object] = {"batch_size": 5, "shuffle": True, "seed": 9, "workers": 0}
    found = loader(dataset, **(arguments | changes))  # type: ignore[arg-type]
    return [list(found) for _ in range(passes)]


def equal(left: list, right: list) -> bool:
    pairs = [pair for ones, others in zip(left, right, strict=True) for pair in zip(ones, others, strict=True)]
    return all(torch.equal(x, a) and torch.equal(y, b) for (x, y), (a, b) in pairs)


def test_items_are_normalized() -> None:
    data = array()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    for (image, label), index in zip([data[7], *data.__getitems__([3, 0, 22])], [7, 3, 0, 22], strict=True):
        torch.testing.assert_close(image.double(), (data.images[index].double() / 255 - mean) / std, rtol=0, atol=2e-6)
        assert (label, type(label)) == (index, int)
    assert torch.equal(data[-1][0], data[22][0])
    with pytest.raises(IndexError, match="index 23 is out of range for 23 images"):
        data[23]
    images, labels = next(iter(DataLoader(data, batch_size=4)))
    assert images.shape == (4, 3, 12, 12)
    assert labels.tolist() == [0, 1, 2, 3]


def test_shift_is_a_crop_of_the_image_padded_by_its_border() -> None:
    most, size = 3, 12
    data = array(shift=most)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    padded = F.pad(data.images[:1].float(), (most,) * 4, mode="replicate")[0]
    crops = {
        (y, x): (padded[:, y : y + size, x : x + size] / 255 - mean) / std
        for y in range(2 * most + 1)
        for x in range(2 * most + 1)
    }
    torch.manual_seed(0)
    seen = set()
    for image, _ in data.__getitems__([0] * 600):
        matches = [at for at, crop in crops.items() if torch.allclose(image, crop, atol=1e-5)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert seen == set(crops)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, TypeError, r"images must be uint8, got torch\.float32"),
        ({"images": torch.zeros(2, 1, 4, 4).byte()}, ValueError, r"shape \(N, 3, S, S\), got \(2, 1, 4, 4\)"),
        ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        ({"shift": 4}, ValueError, r"shift must be in 0\.\.3, got 4"),
        ({"shift": -1}, ValueError, r"shift must be in 0\.\.3, got -1"),
    ],
)
def test_image_array_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    valid: dict[str, Any] = {"images": torch.zeros(2, 3, 4, 4).byte(), "labels": torch.zeros(2).long()}
    with pytest.raises(error, match=message):
        ImageArray(**(valid | changes))


@pytest.mark.parametrize("dataset", [array(shift=2), Noise()], ids=["batched", "one by one"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_only_on_the_seed(dataset: Dataset, workers: int) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = batches(dataset)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(batches(dataset, workers=workers), first)
    assert not equal(batches(dataset, seed=10), first)
    assert not equal(first[:1], first[1:])  # a new order and new transforms in each pass


def test_order_and_batch_sizes() -> None:
    data = array()
    (in_order,) = batches(data, passes=1, shuffle=False)
    assert torch.cat([labels for _, labels in in_order]).tolist() == list(range(23))
    assert [len(labels) for _, labels in in_order] == [5, 5, 5, 5, 3]
    assert in_order[0][0].dtype == torch.float32
    assert in_order[0][1].dtype == torch.int64
    (shuffled,) = batches(data, passes=1)
    assert sorted(torch.cat([labels for _, labels in shuffled]).tolist()) == list(range(23))
    found = loader(data, batch_size=5, shuffle=True, seed=0, workers=0, drop_last=True)
    assert len(found) == len(list(found)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_pass_continues_from_its_state_and_position(workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 5, "shuffle": True, "seed": 9, "workers": workers, "drop_last": True}
    found, again = loader(array(shift=2), **options), loader(array(shift=2), **options)
    list(found)
    state = found.get_state()
    passes = [list(found) for _ in range(2)]
    for skip in (0, 3, 4):  # the pass has 4 batches
        again.set_state(state, skip=skip)
        assert equal([list(again) for _ in range(2)], [passes[0][skip:], passes[1]])


def test_interrupted_pass_does_not_block_the_next() -> None:
    found = loader(array(), batch_size=5, shuffle=True, seed=0, workers=1)
    next(iter(found))
    assert sum(len(labels) for _, labels in found) == 23


class BadRow(ValueError):
    """An error that cannot be unpickled, because its constructor takes two arguments."""

    def __init__(self, row: int, problem: str) -> None:
        super().__init__(f"row {row} {problem}")


class Damaged(Noise):
    """Raises an error for one item."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            raise self.error
        return super().__getitem__(index)


def error_of(found: DataLoader) -> tuple[type[Exception], str, list[str]]:
    """Type, text and notes of the loader's error. The error itself would keep the loader and its workers alive."""
    try:
        list(found)
    except Exception as error:
        return type(error), str(error), getattr(error, "__notes__", [])
    raise AssertionError("no error")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "kinds", "message"),
    [
        (KeyError("a key"), (KeyError,) * 2, "'a key'"),
        (FileNotFoundError(2, "missing", "7.jpg"), (FileNotFoundError,) * 2, "[Errno 2] missing: '7.jpg'"),
        (BadRow(7, "is bad"), (BadRow, RuntimeError), "row 7 is bad"),
    ],
    ids=["text", "file", "not picklable"],
)
def test_errors_of_items_are_the_same_with_workers(
    error: Exception, kinds: tuple[type[Exception], type[Exception]], message: str, workers: int
) -> None:
    found = loader(Damaged(error), batch_size=5, shuffle=False, seed=0, workers=workers)
    for _ in range(2):  # the loader stays usable
        kind, text, notes = error_of(found)
        prefix = "BadRow: " if kinds[workers] is RuntimeError else ""
        assert (kind, text) == (kinds[workers], prefix + message)
        assert bool(notes) == bool(workers)
        assert all("in __getitem__" in note for note in notes)  # where it was raised


def test_workers_without_shared_memory_say_so() -> None:
    found = loader(array(count=600), batch_size=600, shuffle=False, seed=0, workers=1)
    with system_faults.limit(resource.RLIMIT_FSIZE, 10_000):
        kind, text, _ = error_of(found)
    assert kind is OSError
    assert re.match("cannot share a batch of 600 images with worker processes: .*File too large.*; try a smaller", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"dataset": array(count=0)}, "dataset must contain at least one image, got none"),
    ],
)
def test_loader_errors(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"dataset": array(), "batch_size": 5, "shuffle": True, "seed": 0, "workers": 0}
    with pytest.raises(ValueError, match=message):
        loader(**(good | change))  # type: ignore[arg-type]


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=r"DataConfig.name: no data set named 'imagenet'; there are .*rendered"):
        load(DataConfig(name="imagenet"))


def test_register_adds_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.DATASETS, "three", ImageSet)  # removed after the test
    images, half = array(3), (0.5,) * 3

    @register("three")
    class Three(ImageSet):
        classes = 3

        @classmethod
        def load(cls, config: DataConfig) -> ImageData:
            return ImageData(images, images, ("a", "b", "c"), half, half, config.image_size)

    config = DataConfig(name="three", image_size=12)
    assert num_classes(config) == load(config).num_classes == 3


def test_num_classes_reads_no_files() -> None:
    known = {name: num_classes(DataConfig(name=name, classes=7)) for name in data.DATASETS}
    assert known == {"aircraft": 100, "cars196": 196, "cub200": 200, "folder": None, "digits": 10, "rendered": 7}
    assert load(DataConfig(name="digits", image_size=8)).num_classes == 10


@pytest.mark.parametrize("place", [(DataLoader, "__iter__"), (multiprocessing.util, "get_temp_dir")])
def test_workers_that_cannot_start(place: tuple[object, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(*place, fail)
    with pytest.raises(OSError, match=r"cannot load images in 2 worker processes: Too many open files; try fewer"):
        next(iter(loader(array(), batch_size=2, shuffle=False, seed=0, workers=2)))
