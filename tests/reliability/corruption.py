"""Damages every file that the project reads, and puts programs into files of every format that it accepts.

A damaged file must be refused with a reason that names it, or be replaced by the previous one, or load as before. Files
without checksums (of other programs, text, JPEG) cannot reveal changed values: they are only truncated or replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jsonargparse import ArgumentError

from dfkd_fast import data, report
from dfkd_fast.benchmarks.ops import bench
from dfkd_fast.cli import create_parser
from dfkd_fast.config import DataConfig, DistillConfig, read
from dfkd_fast.data import published
from dfkd_fast.data.image_data import read_image
from dfkd_fast.engine.checkpoint import CheckpointError, Checkpoints
from dfkd_fast.models import WeightsMismatch, load_weights, read_description, save_weights
from dfkd_fast.ops.choices import read_choices
from tests import tiny
from tests.data import trees

from ..models.programs import META, WRITERS, Program
from .harness import Tally, command, digest

WORDS = ("config.yaml", "written with another config", "does not accept option")
CHANGES = ("bit", "bytes", "zeros", "removed")  # of a part of the content
REPLACEMENTS = ("truncated", "longer", "another file", "empty", "folder", "link to itself", "missing target", "pipe")


@dataclass
class Subject:
    """A file, the function that reads it, the allowed results with their outcomes, and the words of its errors."""

    kind: str
    path: Path
    load: Callable[[], Any]
    checked: bool = True  # the format has checksums, so changed values must be noticed
    words: tuple[str, ...] = ()
    good: dict[str, str] = field(default_factory=dict)


def _newest(run: Path, config: DistillConfig | None = None) -> Any:
    resolved = {"image_size": tiny.SIZE, "mean": tiny.HALF, "std": tiny.HALF, "precision": "fp32"}
    teacher = tiny.state().teacher_digest()
    return Checkpoints(run / "checkpoints", config or tiny.config(run), teacher, resolved).newest()


def _settings(path: Path) -> Any:
    """Settings that change the algorithm must be refused when the run is resumed; others may differ."""
    parser = create_parser()
    config = parser.instantiate(parser.parse_args(["distill", "--config", str(path)])).distill.distill
    return _newest(path.parent, config)


def _weights(path: Path) -> Any:
    description, network = read_description(path), tiny.network(seed=7)
    load_weights(network, path)
    return network.state_dict(), description


def _images(config: DataConfig) -> Any:
    images = data.load(config)
    return images.classes, [list(split) for split in (images.train, images.test)]  # type: ignore[call-overload]


def subjects(folder: Path) -> list[Subject]:
    """Write one file of each kind."""
    run, state = folder / "run", tiny.network().state_dict()
    tiny.run(run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    settings = partial(_settings, run / "config.yaml")
    found = [
        Subject("checkpoint", newest, partial(_newest, run)),
        Subject("config.yaml of a run", run / "config.yaml", settings, words=WORDS),
    ]
    wrapped = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    for name, checked, write in (
        ("own.safetensors", True, lambda path: save_weights(tiny.network(), path, META)),
        ("zip.pt", True, partial(torch.save, wrapped)),
        ("other.safetensors", False, partial(safetensors.torch.save_file, state)),
        ("legacy.pth", False, partial(torch.save, wrapped, _use_new_zipfile_serialization=False)),
    ):
        write(folder / name)
        found.append(Subject(f"weights, {name}", folder / name, partial(_weights, folder / name), checked))
    row = {"op": "x", "arch": 90, "dtype": "float16", "shape_class": [4, 5], "backend": "cuda"}
    for name, reader in (("results.json", report.read_results), ("choices.json", read_choices)):
        path = report.write_results(folder / name, {"rows": [row]})
        found.append(Subject(name, path, partial(reader, path), False))
    small = {"image_size": 32, "augment": False, "classes": 2, "train_per_class": 2, "test_per_class": 2}
    rendered = DataConfig(root=str(folder / "rendered"), **small)  # type: ignore[arg-type]
    data.load(rendered)
    found.append(Subject("rendered images", next((folder / "rendered").iterdir()), partial(_images, rendered)))
    for name in ("aircraft", "cars", "cub", "folder"):
        root = getattr(trees, f"{name}_tree")(folder / name)
        full = {"cars": "cars196", "cub": "cub200"}.get(name, name)
        load = partial(_images, DataConfig(name=full, root=str(root), image_size=16, augment=False))
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        lists = [path for path in files if path.suffix != ".jpg"]
        found += [Subject(f"{full}: {path.suffix} files", path, load, False) for path in (*lists, files[-1])]
    for subject in found:
        subject.words = subject.words or (subject.path.name,)
        subject.good[digest(subject.load())] = "without effect"
    moved = newest.rename(folder / "moved")
    found[0].good[digest(found[0].load())] = "previous checkpoint used"
    moved.rename(newest)
    return found


def _content(rng: np.random.Generator, content: bytes, other: bytes, how: str) -> bytes:
    size = len(content)  # the first and the last bytes are damaged more often than others
    start = int(rng.choice([rng.integers(size), rng.integers(min(size, 200)), size - 1 - rng.integers(min(size, 200))]))
    end = min(size, start + int(rng.integers(1, 600)))
    part = content[start:end]
    if how == "truncated":  # within a line, because a list that ends with a complete line may just be shorter
        while start and b"\n" in content[start - 1 : start + 1]:
            start -= 1
        return content[:start]
    if how in REPLACEMENTS:
        return {"longer": content + rng.bytes(int(rng.integers(64, 300))), "another file": other, "empty": b""}[how]
    flipped = bytes([part[0] ^ 1 << int(rng.integers(8))]) + part[1:]
    changed = {"bit": flipped, "bytes": rng.bytes(len(part)), "zeros": bytes(len(part)), "removed": b""}
    return content[:start] + changed[how] + content[end:]


def damaged(rng: np.random.Generator, subject: Subject, other: bytes, how: str) -> str:
    """Damage a file and return how its reader copes. Raises AssertionError if it does not."""
    path, content = subject.path, subject.path.read_bytes()
    path.unlink()
    if how in ("link to itself", "missing target"):
        path.symlink_to(path if how == "link to itself" else path.with_name("absent"))
    elif how in ("folder", "pipe"):
        {"folder": os.mkdir, "pipe": os.mkfifo}[how](path)
    else:
        path.write_bytes(_content(rng, content, other, how))
    try:
        outcome = subject.good.get(digest(subject.load()), "loaded wrong")
    except (ValueError, OSError, CheckpointError, ArgumentError) as error:
        clear = isinstance(error, data.DatasetNotFound | WeightsMismatch) or "\n" not in str(error)
        named = any(word in str(error) for word in subject.words)
        outcome = "refused with a reason" if named and clear else repr(error)
    assert outcome in {"refused with a reason", *subject.good.values()}, f"{how}: {path}: {outcome}"
    return outcome


READERS: tuple[Callable[[Path], object], ...] = (
    *(read_description, read_image, report.read_results, read_choices, bench.from_file, partial(read, DistillConfig)),
    *(partial(load_weights, tiny.network()), partial(published.Cars196._read, name="annotations")),
    Checkpoints(Path("checkpoints"), tiny.config(), "").read,
    *(
        lambda path, line=line: command([*line.split(), str(path)])  # type: ignore[misc]
        for line in (
            *("teach --config", "export --image_size 16 --num_classes 5 --model.name resnet8 --weights"),
            *("export --weights", "evaluate --data.name digits --weights"),
            "distill --num_classes 5 --student.name resnet8 --teacher.name resnet8 --out out --teacher.weights",
        )
    ),
)


def inert(rng: np.random.Generator, writer: str) -> str:
    """Write a program into a file and read the file by a command or a function. Raises AssertionError if it runs."""
    path = Path(f"file.{rng.choice(['pt', 'pth', 'safetensors', 'yaml', 'mat', 'npy', 'json', 'jpg'])}").absolute()
    marker, number, outcome = path.with_name("marker"), rng.integers(len(READERS)), "read without effect"
    WRITERS[writer](path, {"state_dict": {"fc.bias": torch.zeros(5)}, "x": Program(marker)})
    try:
        READERS[number](path)
    except (ValueError, OSError, CheckpointError, SystemExit):
        outcome = "refused"
    assert not marker.exists(), f"the program in {path.name} ran in reader {number}"
    return outcome


def run(tally: Tally) -> None:
    """Damage each kind of file in each way; every third case is a program in a file."""
    found = subjects(tally.folder / "files")
    contents = {subject.path: subject.path.read_bytes() for subject in found}
    plan = [(each, how) for how in (*REPLACEMENTS, *CHANGES) for each in found if each.checked or how in REPLACEMENTS]
    for rng in tally.cases():
        turn = tally.seed + tally.index
        if turn % 3 == 0:
            writer = list(WRITERS)[turn // 3 % len(WRITERS)]
            tally.judge(f"program in a file: {writer}", partial(inert, rng, writer))
            continue
        subject, how = plan[turn * 2 // 3 % len(plan)]
        others = [each.path for each in found if each.kind.split(",")[0] != subject.kind.split(",")[0]]
        other = contents[others[int(rng.integers(len(others)))]]
        tally.judge(subject.kind, partial(damaged, rng, subject, other, how), seconds=20.0)
        path = subject.path
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(contents[path])
