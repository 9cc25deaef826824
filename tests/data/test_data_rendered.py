"""The rendered birds: subcategories, disjoint splits, images and the cache."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_fast.config import DataConfig
from dfkd_fast.data import load
from dfkd_fast.data.synthetic import birds
from dfkd_fast.data.synthetic import rendered as rendered_module
from dfkd_fast.data.synthetic.rendered import MOST_CLASSES

NAMES = list(birds.NUISANCES)


def config(root: Path, **changes: object) -> DataConfig:
    small: dict[str, object] = {"image_size": 32, "classes": 3, "train_per_class": 4, "test_per_class": 2}
    return DataConfig(name="rendered", root=str(root), **(small | changes))  # type: ignore[arg-type]


def vectors(split: birds.Split, count: int = 400) -> np.ndarray:
    return np.stack([birds.nuisances(0, split, index % 7, index) for index in range(count)])


def uncovered(index: int) -> np.ndarray:
    """A nuisance vector without leaves."""
    values = birds.nuisances(0, "test", 0, index)
    for leaf in ("leaf0_length", "leaf1_length"):
        values[NAMES.index(leaf)] = birds.NUISANCES[leaf][0]
    return values


def test_subcategories_differ_in_two_parts() -> None:
    words = birds.class_words()
    assert len(set(words)) == len(words) >= MOST_CLASSES
    assert min(sum(a != b for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(words, 2)) == 2


def test_first_ten_subcategories_vary_every_part() -> None:
    for position, (part, values) in enumerate(birds.PARTS.items()):
        seen = {word[position] for word in birds.class_words()[:10]}
        assert seen == set(range(len(values))), part


def test_order_of_subcategories_is_fixed() -> None:
    # Labels of saved teachers refer to this order.
    digest = hashlib.blake2b(bytes(itertools.chain.from_iterable(birds.class_words())), digest_size=8).hexdigest()
    assert digest == "3c84ade393e2e383"
    assert birds.class_name(birds.class_words()[0]) == (
        "blue breast, short beak, no crest, long tail, plain wing, plain face, plain belly"
    )


@pytest.mark.parametrize("index", range(3))
def test_subcategories_differ_visibly_at_32_pixels(index: int) -> None:
    values = uncovered(index)
    images = np.stack([birds.draw(word, values, 32) for word in birds.class_words()[:MOST_CLASSES]]).astype(np.int16)
    for label, image in enumerate(images[:-1]):
        visible = np.abs(images[label + 1 :] - image).max(axis=1) > 40
        assert visible.sum(axis=(1, 2)).min() >= 5, birds.class_name(birds.class_words()[label])


@pytest.mark.parametrize("part", birds.PARTS)
@pytest.mark.parametrize("index", range(3))
def test_part_covers_a_small_share_of_the_image(part: str, index: int) -> None:
    position = list(birds.PARTS).index(part)
    values = uncovered(index)
    plain = birds.draw([0] * 7, values, 96)
    for value in range(1, len(birds.PARTS[part])):
        word = [0] * 7
        word[position] = value
        changed = (birds.draw(word, values, 96) != plain).any(axis=0).mean()
        assert 0.002 < changed < 0.10


def test_splits_share_no_nuisance_value() -> None:
    splits = vectors("train"), vectors("test")
    for position, (name, (low, high)) in enumerate(birds.NUISANCES.items()):
        train, test = ((values[:, position] - low) / (high - low) * birds.STRATA for values in splits)
        assert np.abs(train[:, None] - test).min() >= 0.999 * 2 * birds.GUARD, name
        for first, strata in enumerate((train, test)):
            assert set(np.floor(strata).astype(int)) == set(range(first, birds.STRATA, 2)), name


def test_nuisances_vary_more_than_subcategories_differ(tmp_path: Path) -> None:
    data = load(config(tmp_path, classes=10, train_per_class=60))
    images = data.train.images.to(torch.float32).view(10, 60, -1)
    within = torch.stack([torch.pdist(group).mean() for group in images]).mean()
    between_means = torch.pdist(images.mean(dim=1)).mean()
    assert within > 2 * between_means
    # Two birds of one subcategory differ as much as two of different ones: raw pixels do not separate them.
    assert within > 0.9 * torch.pdist(images[:, 0]).mean()


@pytest.mark.parametrize("size", [32, 33, 64, 100, 224])
def test_images_of_any_size(size: int) -> None:
    image = birds.draw(birds.class_words()[0], birds.nuisances(0, "train", 0, 0), size)
    assert image.shape == (3, size, size)
    assert image.dtype == np.uint8
    assert image.std() > 10


def test_all_image_sizes_show_the_same_scene() -> None:
    word, values = birds.class_words()[3], birds.nuisances(0, "train", 3, 0)
    small = birds.draw(word, values, 32).astype(float)
    large = birds.draw(word, values, 128).astype(float).reshape(3, 32, 4, 32, 4).mean(axis=(2, 4))
    assert np.abs(small - large).mean() < 3


def test_items_and_names(tmp_path: Path) -> None:
    data = load(config(tmp_path))
    assert (len(data.train), len(data.test)) == (12, 6)
    assert data.num_classes == len(set(data.classes)) == 3
    assert (data.mean, data.std, data.image_size) == ((0.5,) * 3, (0.5,) * 3, 32)
    image, label = data.test[5]
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32
    assert image.abs().max() <= 1
    assert type(label) is int
    assert [data.test[index][1] for index in range(6)] == [0, 0, 1, 1, 2, 2]


def test_images_are_identical_in_another_process(tmp_path: Path) -> None:
    script = (
        "import sys; from dfkd_fast.config import DataConfig; from dfkd_fast.data import load\n"
        "load(DataConfig(name='rendered', root=sys.argv[1], image_size=32, classes=3, train_per_class=4,"
        " test_per_class=2))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(rendered_module.__file__).parents[3]), "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], env=environment, check=True)
    load(config(tmp_path / "here"))
    here, there = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there


def test_seed_and_counts(tmp_path: Path) -> None:
    few, many = load(config(tmp_path)), load(config(tmp_path, classes=4, train_per_class=6))
    assert many.classes[:3] == few.classes
    assert torch.equal(many.train.images.view(4, 6, -1)[:3, :4], few.train.images.view(3, 4, -1))
    other = load(config(tmp_path, seed=1))
    assert other.classes == few.classes
    assert not torch.equal(other.train.images, few.train.images)


def test_worker_processes_draw_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load(config(tmp_path / "one"))
    monkeypatch.setattr(rendered_module, "_MIN_FOR_PROCESSES", 1)
    monkeypatch.setattr(rendered_module, "_CHUNK", 5)
    together = load(config(tmp_path / "together", workers=2))
    assert torch.equal(one.train.images, together.train.images)
    assert torch.equal(one.test.images, together.test.images)


def test_cached_images_are_read_and_copied_on_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(config(tmp_path)).train.images
    first = images.clone()
    images.zero_()

    def refuse(*_: object) -> None:
        raise AssertionError("drawn although cached")

    monkeypatch.setattr(birds, "draw", refuse)
    assert torch.equal(load(config(tmp_path)).train.images, first)
    with pytest.raises(AssertionError, match="drawn although cached"):
        load(config(tmp_path, seed=1))


def test_cache_key_depends_on_the_drawing_version() -> None:
    recipe = {"split": "train", "seed": 0, "size": 32, "classes": 3, "per_class": 4}
    stems = {rendered_module._Recipe(**recipe, version=version).stem for version in (1, 2)}  # type: ignore[arg-type]
    assert len(stems) == 2


DAMAGED = {
    "empty": 0,
    "half a header": 40,
    "half the pixels": 300,
    "other shape": None,
    "open bracket in the header": b"\x93NUMPY\1\0\x08\0{'shape(",
    "archive": b"PK\3\4",
}


@pytest.mark.parametrize("kept", DAMAGED.values(), ids=DAMAGED)
def test_damaged_cache_file_is_drawn_again(tmp_path: Path, kept: int | bytes | None) -> None:
    first = load(config(tmp_path)).train.images.clone()
    pixels = next(tmp_path.glob("rendered-train-*.npy"))
    if kept is None:
        np.save(pixels, np.zeros((2, 3, 32, 32), np.uint8))
    else:
        pixels.write_bytes(kept if isinstance(kept, bytes) else pixels.read_bytes()[:kept])
    content = pixels.read_bytes()
    for checksum in (
        b"",
        rendered_module._checksum(content, pixels),
    ):  # a file may have the right checksum
        pixels.write_bytes(content + checksum)
        with pytest.warns(UserWarning, match="drawing it again"):
            again = load(config(tmp_path))
        assert torch.equal(again.train.images, first)
        assert torch.equal(load(config(tmp_path)).train.images, first)


def test_interrupted_drawing_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(birds, "draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(config(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_default_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load(DataConfig(name="rendered", image_size=32, classes=2, train_per_class=1, test_per_class=1))
    assert len(list((tmp_path / "dfkd_fast").glob("rendered-*.npy"))) == 2


def test_cache_folder_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot draw images into .*file/cache: Not a directory; set DataConfig\.root"):
        load(config(tmp_path / "file" / "cache"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"cannot draw images into .*full: No space left on device"):
        load(config(tmp_path / "full"))
    assert list((tmp_path / "full").iterdir()) == []


def test_cache_folder_expands_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICTURES", str(tmp_path))
    load(config(Path("$PICTURES/birds")))
    assert len(list((tmp_path / "birds").glob("rendered-*.npy"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 201}, r"classes must be at most 200 for 'rendered', got 201"),
        ({"image_size": 31}, r"image_size must be in 32\.\.224 for 'rendered', got 31"),
        ({"image_size": 225}, r"image_size must be in 32\.\.224 for 'rendered', got 225"),
        ({"seed": -1}, r"seed must not be negative for 'rendered', got -1"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(config(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []


def test_changed_and_renamed_cache_files_are_drawn_again(tmp_path: Path) -> None:
    same = {"train_per_class": 2}  # both files have the same shape
    first = load(config(tmp_path, **same)).train.images.clone()  # the file is mapped
    train, test = sorted(tmp_path.glob("rendered-*.npy"), reverse=True)
    content = bytearray(train.read_bytes())
    content[len(content) // 2] ^= 1
    for replaced in (bytes(content), test.read_bytes()):
        train.write_bytes(replaced)
        with pytest.warns(UserWarning, match=r"rendered-train-.*is damaged or of an earlier version; drawing it again"):
            assert torch.equal(load(config(tmp_path, **same)).train.images, first)
    train.unlink()
    train.mkdir()
    with pytest.raises(OSError, match=r"cannot draw images into .*rendered-train-.*\.npy: Is a directory"):
        load(config(tmp_path, **same))
