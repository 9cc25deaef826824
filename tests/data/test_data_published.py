"""The published data sets, read from miniature trees, and errors for incomplete trees."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from dfkd_fast.config import DataConfig
from dfkd_fast.data import DATASETS, DatasetNotFound, load, loader
from dfkd_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, training_transform

from .trees import BIRDS, CARS, VARIANTS, aircraft_tree, cars_tree, cub_tree, folder_tree

MAKERS: dict[str, Callable[[Path], Path]] = {
    "aircraft": aircraft_tree,
    "cars196": cars_tree,
    "cub200": cub_tree,
    "folder": folder_tree,
}
CLASSES = {
    "aircraft": VARIANTS,
    "cars196": CARS,
    "cub200": ("Black footed Albatross", "Laysan Albatross", "Sooty Albatross"),
    "folder": ("ant", "bee"),
}


def config(name: str, root: Path | None, **changes: object) -> DataConfig:
    arguments = {"image_size": 24} | changes
    return DataConfig(name=name, root=None if root is None else str(root), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MAKERS)
def test_complete_tree(name: str, tmp_path: Path) -> None:
    data = load(config(name, MAKERS[name](tmp_path)))
    classes = len(CLASSES[name])
    assert data.classes == CLASSES[name]
    assert (len(data.train), len(data.test)) == (3 * classes, 2 * classes)
    assert (data.mean, data.std, data.image_size) == (IMAGENET_MEAN, IMAGENET_STD, 24)
    images, labels = next(iter(loader(data.train, batch_size=64, shuffle=True, seed=0, workers=0)))
    assert images.shape == (3 * classes, 3, 24, 24)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == [3] * classes
    assert type(data.test[0][1]) is int


@pytest.mark.parametrize("name", MAKERS)
def test_only_training_images_are_augmented(name: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path)
    data, still = load(config(name, root)), load(config(name, root, augment=False))
    torch.manual_seed(0)
    assert len({data.train[0][0].sum().item() for _ in range(8)}) > 1
    assert torch.equal(data.test[0][0], data.test[0][0])
    assert torch.equal(still.train[0][0], still.train[0][0])


def test_cub200_split_and_gray_images(tmp_path: Path) -> None:
    data = load(config("cub200", cub_tree(tmp_path)))
    train, test = ([path.name for path, _ in part.samples] for part in (data.train, data.test))
    assert not set(train) & set(test)
    assert train[:3] == [f"{BIRDS[0][4:]}_{index:04d}_{index + 1}.jpg" for index in range(3)]
    gray, _ = data.train[0]
    assert gray.shape == (3, 24, 24)


def test_folder_accepts_val_as_test(tmp_path: Path) -> None:
    assert len(load(config("folder", folder_tree(tmp_path, held_out="val"))).test) == 4


AIRCRAFT, CARS_BASE, CUB = Path("fgvc-aircraft-2013b/data"), Path("stanford_cars"), Path("CUB_200_2011")


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("aircraft", AIRCRAFT / "variants.txt"),
        ("aircraft", AIRCRAFT / "images_variant_trainval.txt"),
        ("aircraft", AIRCRAFT / "images_variant_test.txt"),
        ("aircraft", AIRCRAFT / "images" / "0034958.jpg"),
        ("aircraft", AIRCRAFT / "images" / "0035281.jpg"),  # of the test split
        ("cars196", CARS_BASE / "devkit" / "cars_meta.mat"),
        ("cars196", CARS_BASE / "devkit" / "cars_train_annos.mat"),
        ("cars196", CARS_BASE / "cars_test_annos_withlabels.mat"),
        ("cars196", CARS_BASE / "cars_test"),
        ("cars196", CARS_BASE / "cars_train" / "00002.jpg"),
        ("cars196", CARS_BASE / "cars_test" / "00006.jpg"),
        ("cub200", CUB / "classes.txt"),
        ("cub200", CUB / "images.txt"),
        ("cub200", CUB / "image_class_labels.txt"),
        ("cub200", CUB / "train_test_split.txt"),
        ("cub200", CUB / "images" / BIRDS[1] / "Laysan_Albatross_0002_8.jpg"),
        ("folder", Path("train")),
        ("folder", Path("test")),
    ],
    ids=str,
)
def test_first_missing_file_is_named(name: str, missing: Path, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path) / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(DatasetNotFound) as caught:
        load(config(name, tmp_path))
    assert caught.value.filename == str(path)
    message = str(caught.value)
    assert f"{path} is missing" in message
    assert "Expected under DataConfig.root:\n  " in message
    assert DATASETS[name].layout.source in message
    assert isinstance(caught.value, FileNotFoundError)
    copy = pickle.loads(pickle.dumps(caught.value))  # as a worker process sends it
    assert (str(copy), copy.filename) == (message, str(path))


def test_incomplete_folders(tmp_path: Path) -> None:
    shutil.rmtree(cub_tree(tmp_path) / CUB / "images" / BIRDS[2])
    with pytest.raises(DatasetNotFound, match=r"Sooty_Albatross_0000_11\.jpg is missing"):
        load(config("cub200", tmp_path))
    bee = folder_tree(tmp_path) / "test" / "bee"
    shutil.rmtree(bee)
    with pytest.raises(ValueError, match=r"class 'bee' must be in both .*train and .*test"):
        load(config("folder", tmp_path))
    bee.mkdir()
    with pytest.raises(DatasetNotFound) as caught:
        load(config("folder", tmp_path))
    assert caught.value.filename == str(bee / "*.jpg")


@pytest.mark.parametrize("name", MAKERS)
def test_missing_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DataConfig.root must be the folder that contains .*, got None"):
        load(config(name, None))
    with pytest.raises(DatasetNotFound, match="nowhere is missing"):
        load(config(name, tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("aircraft", AIRCRAFT / "images_variant_test.txt", "0034958 Concorde\n", r"names the variant 'Concorde'"),
        ("aircraft", AIRCRAFT / "images_variant_test.txt", "0034958\n", r"two columns, got the line '0034958'"),
        ("aircraft", AIRCRAFT / "images_variant_test.txt", "\n", r"images_variant_test\.txt is empty"),
        ("cub200", CUB / "image_class_labels.txt", "1 1\n", r"assigns image 2 to the class None"),
        ("cub200", CUB / "image_class_labels.txt", "1 7\n", r"assigns image 1 to the class 7"),
        ("cub200", CUB / "train_test_split.txt", "1 2\n", r"must have 0 or 1 for image 1, got 2"),
    ],
)
def test_invalid_annotations(name: str, file: Path, content: str, message: str, tmp_path: Path) -> None:
    (MAKERS[name](tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(config(name, tmp_path))


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (64, 73), (32, 37)])
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 40)])
def test_transforms(size: int, shorter: int, shape: tuple[int, int]) -> None:
    image = Image.new("RGB", shape, (10, 128, 250))
    color = (torch.tensor([10, 128, 250]) / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    for transform in (
        evaluation_transform(size),
        training_transform(size),
        training_transform(size, crop="random"),
    ):
        out = transform(image)
        assert out.shape == (3, size, size)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, color[:, None, None].expand_as(out), rtol=0, atol=1e-5)
        resized = transform.transforms[0](image)
        assert min(resized.size) == shorter


def test_aircraft_uses_random_crop(tmp_path: Path) -> None:
    def steps(name: str, make: Callable[[Path], Path]) -> list[str]:
        data = load(config(name, make(tmp_path)))
        return [type(step).__name__ for step in data.train.transform.transforms]

    assert steps("aircraft", aircraft_tree)[:3] == ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    assert steps("cars196", cars_tree)[:3] == ["Resize", "RandomResizedCrop", "RandomHorizontalFlip"]
