"""Miniature copies of the published data sets: the same folders and annotation files, a few tiny images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

VARIANTS = ("707-320", "A300B4", "Boeing 717", "Yak-42")
CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012")
BIRDS = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross")


def _jpeg(path: Path, rng: np.random.Generator, *, gray: bool = False, size: tuple[int, int] = (48, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if gray else (size[1], size[0], 3)
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=90)


def aircraft_tree(root: Path, *, train: int = 3, test: int = 2) -> Path:
    """``fgvc-aircraft-2013b`` with four variants; returns ``root``."""
    rng = np.random.default_rng(0)
    data = root / "fgvc-aircraft-2013b" / "data"
    number = 34958
    for split, count in (("trainval", train), ("test", test)):
        rows = []
        for variant in VARIANTS:
            for _ in range(count):
                _jpeg(data / "images" / f"{number:07d}.jpg", rng)
                rows.append(f"{number:07d} {variant}")
                number += 17
        (data / f"images_variant_{split}.txt").write_text("\n".join(rows) + "\n")
    (data / "variants.txt").write_text("\n".join(VARIANTS) + "\n")
    return root


def cars_tree(root: Path, *, train: int = 3, test: int = 2) -> Path:
    """``stanford_cars`` with three classes and MATLAB annotations; returns ``root``."""
    rng = np.random.default_rng(1)
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    train_file, test_file = base / "devkit" / "cars_train_annos.mat", base / "cars_test_annos_withlabels.mat"
    for split, count, file in (("train", train, train_file), ("test", test, test_file)):
        rows = []
        for number in range(count * len(CARS)):
            name = f"{number + 1:05d}.jpg"
            _jpeg(base / f"cars_{split}" / name, rng, size=(36, 48))
            rows.append((*(np.uint16(edge) for edge in (1, 1, 30, 30)), np.uint8(number % len(CARS) + 1), name))
        annotations = np.empty((1, len(rows)), dtype=fields)
        annotations[0] = rows
        scipy.io.savemat(file, {"annotations": annotations})
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    return root


def cub_tree(root: Path, *, train: int = 3, test: int = 2) -> Path:
    """``CUB_200_2011`` with three classes, one gray image and interleaved splits; returns ``root``."""
    rng = np.random.default_rng(2)
    base = root / "CUB_200_2011"
    images, labels, splits = [], [], []
    for label, name in enumerate(BIRDS, start=1):
        for index in range(train + test):
            key = len(images) + 1
            file = f"{name}/{name[4:]}_{index:04d}_{key}.jpg"
            _jpeg(base / "images" / file, rng, gray=key == 1)
            images.append(f"{key} {file}")
            labels.append(f"{key} {label}")
            splits.append(f"{key} {int(index < train)}")
    classes = [f"{number} {name}" for number, name in enumerate(BIRDS, start=1)]
    tables = {"classes": classes, "images": images, "image_class_labels": labels, "train_test_split": splits}
    for name, rows in tables.items():
        (base / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root


def folder_tree(root: Path, *, held_out: str = "test", train: int = 3, test: int = 2) -> Path:
    """An ImageFolder tree with two classes; returns ``root``."""
    rng = np.random.default_rng(3)
    for split, count in (("train", train), (held_out, test)):
        for name in ("ant", "bee"):
            for index in range(count):
                _jpeg(root / split / name / f"{index}.jpg", rng)
    return root
