"""The published data sets, read from miniature trees, and errors for incomplete trees."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from dfkd_fast.cli import main
from dfkd_fast.config import DataConfig
from dfkd_fast.data import DATASETS, DatasetNotFound, load, loader
from dfkd_fast.data.image_data import read_image
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
        (
            "aircraft",
            AIRCRAFT / "images_variant_test.txt",
            "\n0034958 Ko\n",
            r"variant_test\.txt, line 2, names",
        ),
        (
            "aircraft",
            AIRCRAFT / "images_variant_test.txt",
            "1 Yak-42\n\n2\n",
            r"variant_test\.txt, line 3, must",
        ),
        ("aircraft", AIRCRAFT / "variants.txt", "A\nB\nA\n", r"variants\.txt, line 3, repeats the variant 'A'"),
        ("aircraft", AIRCRAFT / "variants.txt", "A\n\0B\n", r"variants\.txt, line 2, contains a zero byte"),
        (
            "cub200",
            CUB / "image_class_labels.txt",
            "\n1 7\n",
            r"labels\.txt, line 2, assigns image 1 to the class 7",
        ),
        (
            "cub200",
            CUB / "image_class_labels.txt",
            "1 1\n1 2\n",
            r"labels\.txt, line 2, has '2' for 1, but line 1",
        ),
        ("cub200", CUB / "train_test_split.txt", "\n1 2\n", r"train_test_split\.txt, line 2, must have 0 or 1"),
        ("cub200", CUB / "images.txt", "1\n", r"images\.txt, line 1, must have two columns"),
    ],
)
def test_invalid_annotations(name: str, file: Path, content: str, message: str, tmp_path: Path) -> None:
    (MAKERS[name](tmp_path) / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(config(name, tmp_path))


def rewritten(text: str, form: str) -> bytes:
    if form not in LINES:
        return text.replace("Yak", "Y\xe9k").replace("Sooty", "S\xf6oty").encode(form)
    return {
        "windows lines": text.replace("\n", "\r\n"),
        "old Mac lines": text.replace("\n", "\r"),
        "blank lines": "\n" + text.replace("\n", " \n\n") + "\n \n",
        "no last line end": text.rstrip("\n"),
        "tabs": "\n".join("\t ".join(line.split(" ", 1)) for line in text.split("\n")),
    }[form].encode()


LINES = ["windows lines", "old Mac lines", "blank lines", "no last line end", "tabs"]


@pytest.mark.parametrize("form", [*LINES, "latin-1", "utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["aircraft", "cub200"])
def test_annotations_in_other_forms(name: str, form: str, tmp_path: Path) -> None:
    root = MAKERS[name](tmp_path)
    expected = load(config(name, root))
    for file in root.glob("*/**/*.txt"):
        text = file.read_text()
        if name == "aircraft" and form == "tabs" and file.name == "variants.txt":
            continue
        content = rewritten(text, form)
        file.write_bytes(b"\xfe\xff" + content if form == "utf-16-be" else content)
    for folder in root.glob("**/003.Sooty_Albatross") if form.startswith(("latin", "utf")) else ():
        for image in folder.iterdir():
            image.rename(image.with_name(image.name.replace("Sooty", "S\xf6oty")))
        folder.rename(folder.with_name("003.S\xf6oty_Albatross"))
    found = load(config(name, root))
    plain = tuple(each.replace("\xe9", "a").replace("\xf6", "o") for each in found.classes)
    assert plain == expected.classes
    for part in ("train", "test"):
        one, other = (getattr(data, part).samples for data in (found, expected))
        assert [label for _, label in one] == [label for _, label in other]
    assert found.test[0][0].shape == (3, 24, 24)


def cars_annotations(path: Path, count: int, **changes: object) -> None:
    """An annotation file of Stanford Cars. A change of None removes the field."""
    rows = [{"bbox_x1": 1, "class": np.uint8(1), "fname": f"{n + 1:05d}.jpg"} | changes for n in range(count)]
    fields = [name for name, value in rows[0].items() if value is not None]
    array = np.empty((1, count), dtype=[(name, object) for name in fields])
    array[0] = [tuple(row[name] for name in fields) for row in rows]
    scipy.io.savemat(path, {"annotations": array})


CARS_TEST = CARS_BASE / "cars_test_annos_withlabels.mat"


def test_cars_with_one_image_and_one_class(tmp_path: Path) -> None:
    base = cars_tree(tmp_path) / CARS_BASE
    for file in (base / "devkit" / "cars_train_annos.mat", tmp_path / CARS_TEST):
        cars_annotations(file, 1, **{"class": 1.0})
    scipy.io.savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS[:1]], dtype=object)})
    data = load(config("cars196", tmp_path))
    assert (data.classes, len(data.train), len(data.test)) == (CARS[:1], 1, 1)
    assert data.test[0][1] == 0


def test_cars_test_annotations_in_the_devkit(tmp_path: Path) -> None:
    test = cars_tree(tmp_path) / CARS_TEST
    test.rename(test.parent / "devkit" / test.name)
    assert len(load(config("cars196", tmp_path)).test) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class": None}, r"row 1, has no field 'class'; a list with labels is required"),
        ({"fname": None}, r"row 1, has no field 'fname'"),
        ({"class": 0}, r"row 1, must have a class from 1 to 3, as in .*cars_meta\.mat, got 0"),
        ({"class": 4}, r"row 1, must have a class from 1 to 3, as in .*cars_meta\.mat, got 4"),
        ({"class": 1.5}, r"row 1, must have a class from 1 to 3"),
        ({"class": np.zeros((0, 0))}, r"row 1, must have a class from 1 to 3"),
        ({"class": np.nan}, r"row 1, must have a class from 1 to 3"),
    ],
)
def test_invalid_cars_annotations(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    cars_annotations(cars_tree(tmp_path) / CARS_TEST, 2, **changes)
    with pytest.raises(ValueError, match=rf"cars_test_annos_withlabels\.mat, {message}"):
        load(config("cars196", tmp_path))


@pytest.mark.parametrize("file", [CARS_TEST, CARS_BASE / "devkit" / "cars_meta.mat"], ids=["annotations", "meta"])
@pytest.mark.parametrize("kept", [0, 60, 127, 200, "text", "7.3", "other variable"])
def test_damaged_cars_files_are_named(file: Path, kept: int | str, tmp_path: Path) -> None:
    path = cars_tree(tmp_path) / file
    if isinstance(kept, int):
        path.write_bytes(path.read_bytes()[:kept])
    elif kept == "other variable":
        scipy.io.savemat(path, {"x": 1})
    else:
        path.write_bytes(
            b"<html>" * 60 if kept == "text" else b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\0" * 512
        )
    reasons = {"7.3": "save it with '-v7'", "other variable": "has no variable"}
    with pytest.raises(ValueError, match=rf"{path.name} .*{reasons.get(str(kept), 'is damaged or not a MATLAB file')}"):
        load(config("cars196", tmp_path))


def test_cars_file_that_crashes_scipy_is_named(tmp_path: Path) -> None:
    path = cars_tree(tmp_path) / CARS_BASE / "devkit" / "cars_meta.mat"
    shape = np.array([1, len(CARS[1])], np.int32).tobytes()
    content = path.read_bytes().replace(shape + b"\1\0\0\0", shape + b"\1\0\x80\0", 1)  # a name of 128 bytes
    assert content != path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cars_meta\.mat is damaged or not a MATLAB file"):
        load(config("cars196", tmp_path))


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "lost+found"])
def test_hidden_folders_and_files_are_ignored(name: str, tmp_path: Path) -> None:
    root = folder_tree(tmp_path)
    expected = load(config("folder", root))
    image = root / "train" / "ant" / "0.jpg"
    for folder in (root / "train", root / "train" / "ant", root / "test" / "bee"):
        (folder / name).mkdir()
        shutil.copy(image, folder / name / "0-checkpoint.jpg")
    (root / "test" / name).mkdir()
    (root / "train" / "ant" / "._0.jpg").write_bytes(b"AppleDouble")
    (root / "train" / ".DS_Store").touch()
    found = load(config("folder", root))
    assert found.classes == expected.classes == ("ant", "bee")
    assert (found.train.samples, found.test.samples) == (expected.train.samples, expected.test.samples)


def test_folders_are_read_in_the_order_of_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = folder_tree(tmp_path)
    for name in ("b/x", "b-c", "B", "a/deep/er"):
        (root / "train" / "ant" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "train" / "ant" / name / "1.PNG")
    assert load(config("folder", root)).train.samples == ImageFolder(root / "train").samples


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes({"half": content[: len(content) // 2], "empty": b"", "text": b"<html></html>"}[kind])


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
@pytest.mark.parametrize("kind", ["half", "empty", "text", "folder", "link"])
def test_images_that_cannot_be_read_are_named(suffix: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (36, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    assert read_image(path).size == (48, 36)
    damage(path, kind)
    with pytest.raises(ValueError, match=rf"cannot read the image {path}: .") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", MAKERS)
def test_damaged_images_are_named_with_and_without_workers(name: str, workers: int, tmp_path: Path) -> None:
    data = load(config(name, MAKERS[name](tmp_path)))
    path = Path(data.test.samples[3][0])
    damage(path, "half")
    with pytest.raises(ValueError, match=rf"^cannot read the image {path}: image file is truncated .*; replace"):
        list(loader(data.test, batch_size=2, shuffle=False, seed=0, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_ends_a_command_in_one_line(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder_tree(tmp_path) / "train" / "ant" / "1.jpg", "half")
    arguments = f"teach --data.name folder --data.root {tmp_path} --data.image_size 16 --data.workers {workers}"
    with pytest.raises(SystemExit) as left:
        main([*arguments.split(), *["--teacher.name", "resnet8", "--teach.batch_size", "2", "--teach.device", "cpu"]])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: cannot read the image {tmp_path}/train/ant/1.jpg: image file is")


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")])
def test_16_bit_images_are_scaled(suffix: str, dtype: str, tmp_path: Path) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray((gray.astype(np.uint32) * 257).astype(dtype))
    image.save(tmp_path / f"image.{suffix}")
    found = np.asarray(read_image(tmp_path / f"image.{suffix}"))
    assert (found == gray[..., None]).all()


@pytest.mark.parametrize("size", [(5, 2**25), (10_000, 10_000), (2, 2_001)])
def test_images_that_would_need_gigabytes_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    """A damaged header can declare any size. The resized copy of a narrow image is large, too."""
    path = tmp_path / "image.bmp"
    Image.new("RGB", (1, 1)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:18] + np.array(size, "<i4").tobytes() + content[26:])
    with pytest.raises(ValueError, match=rf"image\.bmp: it has {size[0]} x {size[1]} pixels, which is too large"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_images_are_refused(dtype: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5 if dtype is np.float32 else 70000, dtype)).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"cannot read the image .*image\.tif: its pixels have 32 bits"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_read_as_by_pil(mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path := tmp_path / ("image.tif" if mode[0] in "CY" else "image.png"))
    with Image.open(path) as image:
        assert (np.asarray(read_image(path)) == np.asarray(image.convert("RGB"))).all()


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


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("aircraft", AIRCRAFT / "variants.txt"),
        ("cars196", CARS_BASE / "devkit" / "cars_meta.mat"),
        ("folder", Path("test/bee/1.jpg")),
    ],
)
def test_pipes_and_folders_instead_of_files(name: str, file: Path, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path) / file
    for make, reason in ((os.mkfifo, "Not a regular file"), (os.mkdir, "Is a directory")):
        path.unlink() if path.is_file() else path.rename(tmp_path / "pipe")
        make(path)
        with pytest.raises((ValueError, OSError), match=rf"{reason}.*{path.name}|{path.name}.*{reason}"):
            list(load(config(name, tmp_path)).test)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        ("aircraft", AIRCRAFT / "variants.txt", lambda text: text + "\x1b\n", r"line 5, contains a control character"),
        (
            "aircraft",
            AIRCRAFT / "images_variant_test.txt",
            lambda text: "0034958 707-320\n" + text,
            r"test\.txt names .*0034958\.jpg, which is also in images_variant_trainval\.txt",
        ),
        ("cub200", CUB / "classes.txt", lambda text: text[:-4], r"images\.txt, line 11, names image 11, .*Albatr"),
        ("cub200", CUB / "images.txt", lambda text: "".join(text.splitlines(True)[:-1]), r"does not name image 15 of"),
        (
            "cub200",
            CUB / "images.txt",
            lambda text: text + "x y\n",
            r"labels\.txt assigns image x .* line 16 of .*images",
        ),
        ("cub200", CUB / "image_class_labels.txt", lambda text: text.replace("2 1", "2 3", 1), r"names image 2, 001"),
        ("cub200", CUB / "images.txt", lambda text: text.replace("\n2 ", "\n2 .\n99 "), r"names image 2, \.,"),
    ],
)
def test_annotations_that_contradict_each_other(
    name: str, file: Path, change: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    path = MAKERS[name](tmp_path) / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        load(config(name, tmp_path))


def test_errors_of_the_system_are_not_missing_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_tree(tmp_path)
    real = os.scandir

    def fail(path: str) -> object:
        if str(path).endswith("bee"):
            raise OSError(24, "Too many open files", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match=r"Too many open files: '.*bee'"):
        load(config("folder", tmp_path))
