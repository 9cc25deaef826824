"""The paper's three data sets in their published layouts, and any ImageFolder tree. Nothing is downloaded.

All files that the annotations name are checked first: an incomplete copy fails here and not in the middle of an epoch.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dfkd_fast.config import DataConfig, require_file
from dfkd_fast.data.image_data import ImageData, ImageFiles, find_images, is_hidden
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
        data = cls.layout.root(config) / "fgvc-aircraft-2013b" / "data"
        number_of: dict[str, int] = {}
        for line, variant in cls.layout.lines(data / "variants.txt"):
            if variant in number_of:
                raise cls.layout.error(data / "variants.txt", line, f"repeats the variant {variant!r}")
            number_of[variant] = len(number_of)

        def split(name: str, transform: Transform) -> ImageFiles:
            annotation, samples = data / f"images_variant_{name}.txt", []
            for line, image, variant in cls.layout.table(annotation):
                if variant not in number_of:
                    raise cls.layout.error(annotation, line, f"names the variant {variant!r}, not in variants.txt")
                samples.append((data / "images" / f"{image}.jpg", number_of[variant]))
            cls.layout.require(path for path, _ in samples)
            return ImageFiles(samples, transform)

        # The authors' loader crops this data set without rescaling.
        augmented, plain = _transforms(config, "random")
        train, test = split("trainval", augmented), split("test", plain)
        if shared := {path for path, _ in train.samples} & {path for path, _ in test.samples}:
            problem = f"names {min(shared)}, which is also in images_variant_trainval.txt"
            raise cls.layout.error(data / "images_variant_test.txt", None, problem)
        return _image_data(config, train, test, list(number_of))


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
        base = cls.layout.root(config) / "stanford_cars"
        names, train = base / "devkit" / "cars_meta.mat", base / "devkit" / "cars_train_annos.mat"
        test = base / "cars_test_annos_withlabels.mat"
        if not test.exists() and (base / "devkit" / test.name).exists():  # as in some copies
            test = base / "devkit" / test.name
        cls.layout.require([names, train, test, base / "cars_train", base / "cars_test"])
        classes = [str(name).strip() for name in cls._read(names, "class_names")]

        def split(annotation: Path, folder: Path, transform: Transform) -> ImageFiles:
            samples = []
            for number, row in enumerate(cls._read(annotation, "annotations"), start=1):
                absent = [name for name in ("class", "fname") if not isinstance(row, dict) or name not in row]
                if absent:
                    problem = f"has no field {absent[0]!r}; a list with labels is required"
                    raise cls.layout.error(annotation, f"row {number}", problem)
                label = np.ravel(row["class"])
                if len(label) != 1 or label[0] not in range(1, len(classes) + 1):
                    problem = f"must have a class from 1 to {len(classes)}, as in {names}, got {row['class']}"
                    raise cls.layout.error(annotation, f"row {number}", problem)
                samples.append((folder / str(row["fname"]).strip(), int(label[0]) - 1))
            cls.layout.require(path for path, _ in samples)
            return ImageFiles(samples, transform)

        augmented, plain = _transforms(config)
        return _image_data(
            config, split(train, base / "cars_train", augmented), split(test, base / "cars_test", plain), classes
        )

    @classmethod
    def _read(cls, path: Path, name: str) -> list[Any]:
        """The elements of an array in a MATLAB file, with structs as dicts."""
        content = _load_matlab(path)
        if isinstance(content, NotImplementedError):  # of MATLAB 7.3
            raise cls.layout.error(path, None, f"cannot be read: {content}; save it with '-v7'") from content
        if isinstance(content, Exception):
            problem = f"is damaged or not a MATLAB file: {type(content).__name__}: {content}"
            raise cls.layout.error(path, None, problem) from content
        if name not in content:
            raise cls.layout.error(path, None, f"has no variable {name!r}")
        value = content[name]
        # An array of one element is read as the element.
        values = list(value) if isinstance(value, list | np.ndarray) else [value]
        if not values:
            raise cls.layout.error(path, None, "is empty")
        return values


def _load_matlab(path: Path) -> dict[str, Any] | Exception:
    """The content of a MATLAB file, or the error, which may be of any type for a damaged file.

    Another process reads the file, because some damaged files crash scipy.
    """
    from scipy.io import loadmat  # slow to import

    def load() -> None:
        try:
            sender.send(loadmat(require_file(path), simplify_cells=True))
        except Exception as error:
            sender.send(error)

    context = multiprocessing.get_context("fork")  # as for DataLoader
    receiver, sender = context.Pipe(duplex=False)
    with receiver, sender:
        process = context.Process(target=load)
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except Exception as error:
            process.join()
            return RuntimeError(f"the process that read it ended with status {process.exitcode} ({error!r})")
        finally:
            process.join()


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
        base = cls.layout.root(config) / "CUB_200_2011"
        labels, splits = base / "image_class_labels.txt", base / "train_test_split.txt"
        names = cls.layout.mapping(base / "classes.txt")
        label_of, split_of = cls.layout.mapping(labels), cls.layout.mapping(splits)
        number_of = {key: number for number, key in enumerate(names)}
        samples: dict[str, list[tuple[Path, int]]] = {"0": [], "1": []}
        listed = base / "images.txt"
        images = cls.layout.mapping(listed)
        for key, (number, name) in images.items():
            # A file that was cut off has no line for some images.
            line, label = label_of.get(key, (None, None))
            if label not in number_of:
                problem = f"assigns image {key} to the class {label}, not in classes.txt"
                raise cls.layout.error(labels, line, f"{problem}; line {number} of {listed} names the image")
            line, part = split_of.get(key, (None, None))
            if part not in samples:
                problem = f"must have 0 or 1 for image {key}, got {part}"
                raise cls.layout.error(splits, line, f"{problem}; line {number} of {listed} names the image")
            if Path(name).parts[:1] != (names[label][1],):
                problem = f"names image {key}, {name}, but its class is {names[label][1]!r} in {labels} and classes.txt"
                raise cls.layout.error(listed, number, problem)
            samples[part].append((base / "images" / name, number_of[label]))
        for path, table in ((labels, label_of), (splits, split_of)):
            for key, (number, _) in table.items():
                if key not in images:
                    raise cls.layout.error(listed, None, f"does not name image {key} of line {number} of {path}")
        cls.layout.require(path for part in ("1", "0") for path, _ in samples[part])
        augmented, plain = _transforms(config)
        train, test = ImageFiles(samples["1"], augmented), ImageFiles(samples["0"], plain)
        classes = [re.sub(r"^\d+\.", "", name).replace("_", " ") for _, name in names.values()]
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
        train, classes = _image_folder(root / "train", augmented)
        test, held_out_classes = _image_folder(held_out, plain)
        if classes != held_out_classes:
            first = min(set(classes) ^ set(held_out_classes))
            raise ValueError(f"{cls.layout.title}: class {first!r} must be in both {root / 'train'} and {held_out}")
        return _image_data(config, train, test, classes)


def _image_folder(folder: Path, transform: Transform) -> tuple[ImageFiles, list[str]]:
    """The images of a folder per class, in the order of torchvision's ImageFolder, and the classes."""
    if not folder.is_dir():
        raise DatasetNotFound(folder, Folder.layout)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))
    samples: list[tuple[str, int]] = []
    for number, name in enumerate(classes or ["<class>"]):
        found = find_images(folder / name)
        if not found:
            raise DatasetNotFound(folder / name / "*.jpg", Folder.layout)
        samples += [(path, number) for path in found]
    return ImageFiles(samples, transform), classes
