"""The paper's three data sets in their published layouts, and any ImageFolder tree. Nothing is downloaded.

All files that the annotations name are checked first: an incomplete copy fails here and not in the middle of an epoch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import FGVCAircraft, ImageFolder, StanfordCars
from torchvision.datasets.folder import default_loader

from dfkd_fast.config import DataConfig
from dfkd_fast.data.image_data import ImageData
from dfkd_fast.data.registry import DatasetNotFound, ImageSet, Layout, register
from dfkd_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, evaluation_transform, training_transform

__all__ = ["CUB200", "Aircraft", "Cars196", "Folder"]


Crop = Literal["random_resized", "random"]
Transform = Callable[[Any], Tensor]


def _transforms(config: DataConfig, crop: Crop = "random_resized") -> tuple[Transform, Transform]:
    plain = evaluation_transform(config.image_size)
    return training_transform(config.image_size, crop=crop) if config.augment else plain, plain


def _image_data(config: DataConfig, train: Dataset[Any], test: Dataset[Any], classes: list[str]) -> ImageData:
    return ImageData(
        train=train,
        test=test,
        classes=tuple(classes),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        image_size=config.image_size,
    )


@register("aircraft")
class Aircraft(ImageSet):
    """FGVC-Aircraft by variant: 6,667 training images (its trainval split) and 3,333 test images."""

    classes = 100
    layout = Layout(
        title="FGVC-Aircraft",
        tree="""
            fgvc-aircraft-2013b/
              data/
                variants.txt
                images_variant_trainval.txt    6,667 lines "1025794 707-320"
                images_variant_test.txt        3,333 lines
                images/                        1025794.jpg, ...
        """,
        source="Published at https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/ (Maji et al., 2013).",
    )

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        root = cls.layout.root(config)
        data = root / "fgvc-aircraft-2013b" / "data"
        variants = cls.layout.lines(data / "variants.txt")
        for split in ("trainval", "test"):
            annotation = data / f"images_variant_{split}.txt"
            rows = cls.layout.table(annotation)
            unknown = next((row for row in rows if row[1] not in variants), None)
            if unknown is not None:
                raise ValueError(
                    f"{cls.layout.title}: {annotation} names the variant {unknown[1]!r}, not in variants.txt"
                )
            cls.layout.require(data / "images" / f"{image}.jpg" for image, _ in rows)
        # The authors' loader crops this data set without rescaling.
        augmented, plain = _transforms(config, "random")
        train = FGVCAircraft(root, split="trainval", annotation_level="variant", transform=augmented)
        test = FGVCAircraft(root, split="test", annotation_level="variant", transform=plain)
        return _image_data(config, train, test, train.classes)


@register("cars196")
class Cars196(ImageSet):
    """Stanford Cars: 8,144 training images and 8,041 test images."""

    classes = 196
    layout = Layout(
        title="Stanford Cars",
        tree="""
            stanford_cars/
              devkit/
                cars_meta.mat
                cars_train_annos.mat           8,144 annotations
              cars_test_annos_withlabels.mat   8,041 annotations
              cars_train/                      00001.jpg, ...
              cars_test/                       00001.jpg, ...
        """,
        source=(
            "Published at https://ai.stanford.edu/~jkrause/cars/car_dataset.html (Krause et al., 2013); that page is\n"
            "offline; https://github.com/pytorch/vision/issues/7545 lists copies."
        ),
    )

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        root = cls.layout.root(config)
        base = root / "stanford_cars"
        parts = ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat")
        cls.layout.require(base / part for part in (*parts, "cars_train", "cars_test"))
        augmented, plain = _transforms(config)
        # The labels in the .mat files are NumPy uint8, which a loader would collate to a uint8 tensor.
        train = StanfordCars(root, split="train", transform=augmented, target_transform=int)
        test = StanfordCars(root, split="test", transform=plain, target_transform=int)
        for part in (train, test):
            cls.layout.require(Path(path) for path, _ in part._samples)
        return _image_data(config, train, test, train.classes)


class _ImageList(Dataset[tuple[Tensor, int]]):
    """Images by path."""

    def __init__(self, samples: list[tuple[Path, int]], transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(default_loader(str(path))), label


@register("cub200")
class CUB200(ImageSet):
    """CUB-200-2011: 5,994 training images and 5,794 test images."""

    classes = 200
    layout = Layout(
        title="CUB-200-2011",
        tree="""
            CUB_200_2011/
              classes.txt                      200 lines "1 001.Black_footed_Albatross"
              images.txt                       11,788 lines "1 001.Black_footed_Albatross/Black_Footed_..._18.jpg"
              image_class_labels.txt           11,788 lines "1 1"
              train_test_split.txt             11,788 lines "1 0": 0 is a test image, 1 a training image
              images/                          001.Black_footed_Albatross/, ...
        """,
        source="Published at https://www.vision.caltech.edu/datasets/cub_200_2011/ (Wah et al., 2011).",
    )

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        base, title = cls.layout.root(config) / "CUB_200_2011", cls.layout.title
        names = dict(cls.layout.table(base / "classes.txt"))
        images = cls.layout.table(base / "images.txt")
        label_of = dict(cls.layout.table(base / "image_class_labels.txt"))
        split_of = dict(cls.layout.table(base / "train_test_split.txt"))
        number_of = {key: number for number, key in enumerate(names)}

        def rows() -> Iterator[tuple[bool, Path, int]]:
            for key, name in images:
                label, split = label_of.get(key), split_of.get(key)
                if label not in number_of:
                    raise ValueError(f"{title}: image_class_labels.txt assigns image {key} to the class {label}")
                if split not in ("0", "1"):
                    raise ValueError(f"{title}: train_test_split.txt must have 0 or 1 for image {key}, got {split}")
                yield split == "1", base / "images" / name, number_of[label]

        samples = list(rows())
        cls.layout.require(path for _, path, _ in samples)
        augmented, plain = _transforms(config)
        train = _ImageList([(path, label) for training, path, label in samples if training], augmented)
        test = _ImageList([(path, label) for training, path, label in samples if not training], plain)
        classes = [re.sub(r"^\d+\.", "", name).replace("_", " ") for name in names.values()]
        return _image_data(config, train, test, classes)


@register("folder")
class Folder(ImageSet):
    """One folder per class under ``train`` and ``test`` (or ``val``), with the paper's transforms."""

    layout = Layout(
        title="Image folder",
        tree="""
            train/
              <class>/                         *.jpg, *.png, ...
            test/                              or val/
              <class>/                         the same classes as in train/
        """,
        source="Any tree that torchvision.datasets.ImageFolder reads.",
    )

    @classmethod
    def load(cls, config: DataConfig) -> ImageData:
        root = cls.layout.root(config)
        held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
        augmented, plain = _transforms(config)
        train, test = _image_folder(root / "train", augmented), _image_folder(held_out, plain)
        if train.classes != test.classes:
            first = min(set(train.classes) ^ set(test.classes))
            raise ValueError(f"{cls.layout.title}: class {first!r} must be in both {root / 'train'} and {held_out}")
        return _image_data(config, train, test, train.classes)


def _image_folder(folder: Path, transform: Transform) -> ImageFolder:
    if not folder.is_dir():
        raise DatasetNotFound(folder, Folder.layout)
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    dataset = ImageFolder(folder, transform=transform, allow_empty=True) if classes else None
    filled = set(dataset.targets) if dataset is not None else set()
    for number, name in enumerate(classes or [folder / "<class>"]):
        if number not in filled:
            raise DatasetNotFound(name / "*.jpg", Folder.layout)
    assert dataset is not None
    return dataset
