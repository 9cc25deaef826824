"""Damages every file that the project reads, and puts programs into files of every format that it accepts.

A damaged file must be refused with a reason that names it, or be replaced by the previous one, or load as before.
Formats without checksums (files of other programs, text, JPEG) cannot reveal changed values: they are only truncated,
swapped and replaced by other kinds of files.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jsonargparse import ArgumentError
from torch.utils._pytree import tree_map_only

from dfkd_fast import data as datasets
from dfkd_fast import report
from dfkd_fast.cli import create_parser, main
from dfkd_fast.config import DataConfig, DistillConfig, read
from dfkd_fast.data import published
from dfkd_fast.data.image_data import read_image
from dfkd_fast.engine.checkpoint import CheckpointError, Checkpoints
from dfkd_fast.models import WeightsMismatch, load_weights, read_description, save_weights
from dfkd_fast.ops.choices import read_choices
from tests import tiny
from tests.data import trees

from .harness import Tally

MULTILINE = (datasets.DatasetNotFound, WeightsMismatch)
META = {"num_classes": "5", "image_size": "16", "classes": json.dumps(list("abcde")), "mean": "0.5", "model": "resnet8"}


@dataclass
class Subject:
    """A file of the project, and what the project reads from it.

    Attributes:
        kind: name in the results.
        path: the file.
        load: returns what the project reads.
        checked: the format has checksums, so changed values must be noticed.
        names: an error must contain one of these; by default the file's name.
        good: what ``load`` may return: the outcome by content.
    """

    kind: str
    path: Path
    load: Callable[[], Any]
    checked: bool = True
    names: tuple[str, ...] = ()
    good: dict[str, str] = field(default_factory=dict)


def content_of(value: Any) -> str:
    """Everything that is loaded, with all bytes of all tensors, as comparable text."""
    return repr(
        tree_map_only(torch.Tensor, lambda x: (x.dtype, tuple(x.shape), x.contiguous().numpy().tobytes().hex()), value)
    )


def _checkpoints(run: Path) -> Callable[[], Any]:
    config, state = tiny.config(run), tiny.state()
    resolved = {"image_size": tiny.SIZE, "mean": tiny.HALF, "std": tiny.HALF, "precision": "fp32"}
    return Checkpoints(run / "checkpoints", config, state.teacher_digest(), resolved).newest


def _weights(path: Path) -> Any:
    description, network = read_description(path), tiny.network(seed=7)
    load_weights(network, path)
    return network.state_dict(), description


def _images(config: DataConfig) -> Any:
    images = datasets.load(config)
    return images.classes, [list(split) for split in (images.train, images.test)]  # type: ignore[call-overload]


def _settings(path: Path, run: Path) -> Any:
    """Settings that change the algorithm must be refused when the run is resumed; others may differ."""
    parser = create_parser()
    config = parser.instantiate(parser.parse_args(["distill", "--config", str(path)])).distill.distill
    resolved = {"image_size": tiny.SIZE, "mean": tiny.HALF, "std": tiny.HALF, "precision": "fp32"}
    return Checkpoints(run / "checkpoints", config, tiny.state().teacher_digest(), resolved).newest()


def subjects(folder: Path) -> list[Subject]:
    """Write one file of each kind."""
    network, weights, run = tiny.network(), folder / "weights", folder / "run"
    tiny.run(run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    save_weights(network, weights / "own.safetensors", META)
    safetensors.torch.save_file(network.state_dict(), weights / "other.safetensors", metadata=META)
    torch.save({"state_dict": state}, weights / "zip.pt")
    torch.save({"state_dict": state}, weights / "legacy.pth", _use_new_zipfile_serialization=False)
    results = report.write_results(folder / "results.json", {"rows": [{"op": "x", "value": 0.5}], "environments": []})
    row = {"op": "x", "arch": 90, "dtype": "float16", "shape_class": [4, 5], "backend": "cuda"}
    choices = report.write_results(folder / "choices.json", {"rows": [row]})
    found = [
        Subject("checkpoint", newest, _checkpoints(run)),
        Subject(
            "config.yaml of a run",
            run / "config.yaml",
            partial(_settings, run / "config.yaml", run),
            names=("config.yaml", "written with another config", "does not accept option"),
        ),
        *(
            Subject(kind, weights / name, partial(_weights, weights / name), checked)
            for kind, name, checked in (
                ("weights, safetensors", "own.safetensors", True),
                ("weights, torch zip", "zip.pt", True),
                ("weights, safetensors of other programs", "other.safetensors", False),
                ("weights, legacy torch pickle", "legacy.pth", False),
            )
        ),
        Subject("results.json", results, partial(report.read_results, results), checked=False),
        Subject("choices.json", choices, partial(read_choices, choices), checked=False),
    ]
    rendered = DataConfig(
        name="rendered", root=str(folder / "rendered"), image_size=32, classes=2, train_per_class=2, test_per_class=2,
        augment=False,
    )  # fmt: skip
    datasets.load(rendered)
    cached = sorted((folder / "rendered").iterdir())[0]
    found.append(Subject("rendered images, cached", cached, partial(_images, rendered)))
    for name, build in (
        ("aircraft", trees.aircraft_tree),
        ("cars196", trees.cars_tree),
        ("cub200", trees.cub_tree),
        ("folder", trees.folder_tree),
    ):
        root = build(folder / name)
        load = partial(_images, DataConfig(name=name, root=str(root), image_size=16, augment=False))
        files = [path for path in sorted(root.rglob("*")) if path.is_file()]
        found += [
            Subject(f"{name}: {'image' if path.suffix == '.jpg' else path.name}", path, load, checked=False)
            for path in [*(path for path in files if path.suffix != ".jpg"), *files[-1:]]
        ]
    for subject in found:
        subject.names = subject.names or (subject.path.name,)
        subject.good[content_of(subject.load())] = "without effect"
    moved = newest.rename(folder / "moved")
    found[0].good[content_of(found[0].load())] = "previous checkpoint used"
    moved.rename(newest)
    return found


def _place(rng: np.random.Generator, size: int) -> int:
    """An offset in a file; the first and the last bytes are as frequent as all others."""
    offsets = rng.integers(size), rng.integers(min(size, 200)), size - 1 - rng.integers(min(size, 200))
    return int(offsets[rng.integers(3)])


def _changed(rng: np.random.Generator, content: bytes, how: str) -> bytes:
    start = _place(rng, len(content))
    end = min(len(content), start + int(rng.integers(1, 600)))
    part = bytearray(content[start:end])
    if how == "bit":
        part[0] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        part[:] = rng.bytes(len(part))
    elif how == "zeros":
        part[:] = bytes(len(part))
    elif how == "removed":
        part.clear()
    elif how == "repeated":
        part *= 2
    elif how == "exchanged":
        part.reverse()
    return content[:start] + bytes(part) + content[end:]


def _truncated(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut off within a line: a list that ends with a complete line may just be shorter."""
    end = _place(rng, len(content))
    while end and b"\n" in content[end - 1 : end + 1]:
        end -= 1
    return content[:end]


CHANGES = ("bit", "bytes", "zeros", "removed", "repeated", "exchanged")
REPLACEMENTS = ("truncated", "longer", "another file", "empty", "folder", "link to itself", "missing target", "pipe")


def damage(rng: np.random.Generator, subject: Subject, other: bytes, how: str) -> None:
    path, content = subject.path, subject.path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how in ("link to itself", "missing target"):
        path.symlink_to(path if how == "link to itself" else path.with_name("absent"))
    else:
        replaced = {
            "truncated": _truncated(rng, content),
            "longer": content + rng.bytes(int(rng.integers(64, 300))),
            "another file": other,
            "empty": b"",
        }
        path.write_bytes(replaced[how] if how in replaced else _changed(rng, content, how))


def judged(rng: np.random.Generator, subject: Subject, other: bytes, how: str) -> str:
    """Damage a file and return how its reader copes. Raises AssertionError if it does not."""
    damage(rng, subject, other, how)
    warnings.simplefilter("ignore")
    logging.disable()
    found = "an error"
    try:
        found = content_of(subject.load())
    except (ValueError, OSError, CheckpointError, ArgumentError) as error:
        named = any(name in str(error) for name in subject.names)
        clear = isinstance(error, MULTILINE) or "\n" not in str(error)
        problem = f"unclear: {error!r}" if not (named and clear) else None
    except Exception as error:
        problem = repr(error)
    else:
        problem = None if found in subject.good else "loaded wrong"
    if problem is not None:
        raise AssertionError(f"{how}: {subject.path}: {problem}")
    return subject.good.get(found, "refused with a reason")


class Program:
    """Pickles to a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _tar(path: Path, content: Any) -> None:
    """The format of torch before 2017."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry, data = tarfile.TarInfo(name), pickle.dumps(content)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def _metadata(path: Path, content: Any) -> None:
    """Names a function as the network; torch.hub runs the file hubconf.py of a folder."""
    (path.parent / "hubconf.py").write_text(f"import os; os.system({content['x'].command!r})")
    options = {"repo_or_dir": str(path.parent), "model": "x", "source": "local", "trust_repo": True}
    metadata = {**META, "model": "torch:hub.load", "options": json.dumps(options)}
    safetensors.torch.save_file(tiny.network().state_dict(), path, metadata=metadata)


WRITERS: dict[str, Callable[[Path, Any], object]] = {
    "pickle": lambda path, content: path.write_bytes(pickle.dumps(content)),
    "torch zip": lambda path, content: torch.save(content, path),
    "torch legacy": lambda path, content: torch.save(content, path, _use_new_zipfile_serialization=False),
    "torch tar": _tar,
    "metadata": _metadata,
    "YAML": lambda path, content: path.write_text(f"x: !!python/object/apply:os.system ['{content['x'].command}']"),
    "npy": lambda path, content: np.save(path.open("wb"), np.array([content], dtype=object)),
    "npz": lambda path, content: np.savez(path.open("wb"), a=np.array([content], dtype=object)),
}
COMMANDS = (
    "export --image_size 16 --num_classes 5 --weights FILE",
    "export --image_size 16 --num_classes 5 --model.name resnet8 --weights FILE",
    "evaluate --data.name digits --weights FILE",
    "evaluate --data.name digits --model.name resnet8 --weights FILE",
    "distill --num_classes 5 --student.name resnet8 --distill.image_size 16 --out out --teacher.weights FILE",
    "distill --num_classes 5 --student.name resnet8 --teacher.name resnet8 --out out --teacher.weights FILE",
    "profile --num_classes 5 --student.name resnet8 --teacher.name resnet8 --out out --teacher.weights FILE",
    "teach --data.name digits --teacher.name resnet8 --out out --teacher.weights FILE",
    "teach --config FILE",
    "bench distillation_kl --device cpu --shapes FILE",
)
LOADERS: tuple[Callable[[Path], object], ...] = (
    lambda path: load_weights(tiny.network(), path),
    read_description,
    Checkpoints(Path("checkpoints"), tiny.config(), "").read,
    partial(published.Cars196._read, name="annotations"),
    read_image,
    partial(read, DistillConfig),
    report.read_results,
    read_choices,
)


def inert(folder: Path, rng: np.random.Generator, writer: str) -> str:
    """Write a program into a file and read the file by a command or a function. Raises AssertionError if it runs."""
    suffix = rng.choice(["pt", "pth", "safetensors", "yaml", "mat", "npy", "json", "jpg"])
    marker, path = folder / "marker", folder / f"file.{suffix}"
    WRITERS[writer](path, {"state_dict": {"fc.bias": torch.zeros(5)}, "x": Program(marker)})
    number, outcome = int(rng.integers(len(COMMANDS) + len(LOADERS))), "read, without effect"
    os.chdir(folder)
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            if number < len(COMMANDS):
                main(COMMANDS[number].replace("FILE", str(path)).split())
            else:
                LOADERS[number - len(COMMANDS)](path)
    except (ValueError, OSError, CheckpointError, SystemExit):
        outcome = "refused"
    if marker.exists():
        raise AssertionError(f"the program in {path.name} ran in {(*COMMANDS, *LOADERS)[number]}")
    return outcome


def run(tally: Tally) -> None:
    """Damage files for one half of the time, and load programs for the other one."""
    folder = tally.folder / "files"
    found = subjects(folder)
    contents = {subject.path: subject.path.read_bytes() for subject in found}
    plan = [
        (subject, how)
        for how in (*REPLACEMENTS, *CHANGES)
        for subject in found
        if subject.checked or how in REPLACEMENTS
    ]
    programs = tally.folder / "programs"
    for rng in tally.cases():
        if tally.index % 3 == 0:
            shutil.rmtree(programs, ignore_errors=True)
            programs.mkdir()
            writer = list(WRITERS)[tally.index // 3 % len(WRITERS)]
            tally.judge(f"program in a file: {writer}", partial(inert, programs, rng, writer))
            continue
        subject, how = plan[tally.index * 2 // 3 % len(plan)]
        others = [each.path for each in found if each.kind.split(",")[0] != subject.kind.split(",")[0]]
        other = contents[others[int(rng.integers(len(others)))]]
        tally.judge(subject.kind, partial(judged, rng, subject, other, how), seconds=20.0)
        path = subject.path
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(contents[path])
