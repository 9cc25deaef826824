"""Fuzzes everything that reads files, paths and command lines, guided by coverage (atheris) and structure (Hypothesis).

Each case gives one parser to a forked process, which makes inputs for some seconds. An input must be accepted, or
refused with a documented error that names the file. Counts, faults and the current input are in shared memory, so they
outlive a crash or a hang.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import mmap
import os
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dfkd_fast import cli, config, data
from dfkd_fast.benchmarks.ops import bench
from dfkd_fast.data import image_data, published, registry
from dfkd_fast.data.synthetic import rendered
from dfkd_fast.data.transforms import evaluation_transform
from dfkd_fast.engine import checkpoint
from dfkd_fast.models import weights
from dfkd_fast.report import results

from .. import tiny
from ..data import trees
from .harness import Tally

HANG_S = 30
INVALID = object()
ROUND_S = 300.0
"""Longest time in which every parser gets its share once."""


@dataclass(frozen=True)
class Parser:
    """A parser of one kind of input.

    Args:
        read: parses an input; returns normally if it is accepted.
        names: text that the message of a refusal must contain, usually the file's name.
        seeds: valid inputs, which the fuzzer changes.
        refusals: documented errors. Subclasses are faults: UnicodeDecodeError is no refusal.
        share: share of the time, relative to other parsers.
    """

    read: Callable[[bytes], object]
    names: str
    seeds: Sequence[bytes] = ()
    refusals: tuple[type[BaseException], ...] = (ValueError,)
    share: float = 1.0


def _structured(strategy: st.SearchStrategy[Any], read: Callable[[Any], object]) -> Callable[[bytes], object]:
    """Decode inputs as the values of a strategy. The result is ``INVALID`` for bytes that encode none."""

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def test(value: Any) -> None:
        read(value)

    return lambda content: None if test.hypothesis.fuzz_one_input(content) is not None else INVALID


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e-320]), st.booleans())
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=8)),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)


def _paths_of(kind: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of a config's fields, with those of nested configs."""
    for field in fields(kind):
        yield (*prefix, field.name)
        with contextlib.suppress(TypeError):
            if is_dataclass(inner := field.default_factory()):
                yield from _paths_of(type(inner), (*prefix, field.name))


def _nested(changes: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for path, value in changes.items():
        owner: Any = whole
        for name in path[:-1]:
            owner = owner.setdefault(name, {}) if isinstance(owner, dict) else {}
        if isinstance(owner, dict):
            owner[path[-1]] = value
    return whole


def _saved(content: Any) -> bytes:
    torch.save(content, buffer := io.BytesIO())
    return buffer.getvalue()


def _weights(folder: Path) -> dict[str, Parser]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path, text = folder / "w.safetensors", folder / "w.pt"
    weights.save_weights(model, path, {"model": "m", "num_classes": "3", "classes": '["a", "b", "c"]', "mean": "0.5"})
    safe = path.read_bytes()
    tensors = safe[8 + int.from_bytes(safe[:8], "little") :]

    def load(file: Path, content: bytes) -> None:
        file.write_bytes(content)
        model.load_state_dict(state)
        try:
            report = weights.load_weights(model, file)
        except Exception:
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "changed"
            raise
        assert all(value.isfinite().all() for value in model.state_dict().values()), "loads non-finite weights"
        assert set(report.loaded) | set(report.absent_counters) == set(state), "not all weights are loaded"

    def header(content: bytes) -> None:  # the first byte selects whether the length is that of the header
        if content[:1] != b"\0":
            content = len(content).to_bytes(8, "little") + content + tensors
        load(path, content)

    def described(content: bytes) -> None:
        values = content.decode("latin-1").split("\n")
        head = json.dumps({"__metadata__": dict(zip(weights._FIELDS, values, strict=False))}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head)
        found = weights.read_description(path)
        for numbers in (found.mean, found.std):
            assert numbers is None or all(map(math.isfinite, numbers)), f"accepts {numbers}"

    def pickled(content: Any) -> None:
        load(text, _saved(content))
        assert not any(value.is_complex() for value in content.values() if isinstance(value, torch.Tensor)), "complex"

    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.complex128]
    tensor = st.builds(
        lambda value, dtype, form, fill: form((value + fill).to(dtype)),
        st.sampled_from([*state.values(), torch.zeros(0), torch.zeros(3, 1)]),
        st.sampled_from(dtypes),
        st.sampled_from([lambda t: t, lambda t: t.to_sparse(), lambda t: t.to("meta"), nn.Parameter, lambda t: t.mT]),
        st.sampled_from([0, 0, math.nan, math.inf, 1e30]),
    )
    names = st.sampled_from([*state, *("module." + name for name in state), "model.0.weight", "", "\ud800", "module"])
    entry = st.one_of(tensor, VALUES)
    keys = st.one_of(names, st.integers(), st.none(), st.tuples(st.text(max_size=2)))
    changed = st.builds(lambda new, dropped: {k: v for k, v in {**state, **new}.items() if k not in dropped},
                        st.dictionaries(keys, entry, max_size=3), st.sets(names, max_size=1))  # fmt: skip
    nested = st.recursive(changed, lambda each: st.dictionaries(st.sampled_from(weights._NESTED), each, max_size=2))
    refusals = (weights.WeightsFormatError, weights.WeightsMismatch, ValueError)
    metadata = b'3\n["a", "b", "c"]\n32\n[0.5, 0.5, 0.5]\n[0.5]\n{"widths": [4]}'
    zipped = _saved(state)
    torch.save({"state_dict": state}, legacy := io.BytesIO(), _use_new_zipfile_serialization=False)
    return {
        "safetensors header": Parser(header, path.name, [safe[8 : -len(tensors)], b"\0" + safe], refusals, share=2),
        "weights metadata": Parser(described, path.name, [metadata, b"3"], refusals, share=3),
        "torch weights file": Parser(lambda b: load(text, b), text.name, [zipped, legacy.getvalue()], refusals),
        "state dict": Parser(_structured(nested, pickled), text.name, refusals=refusals),
    }


def _trees(folder: Path) -> dict[str, Parser]:
    """The published data sets, each with one file replaced, and trees of folders with odd names."""
    made: dict[str, Parser] = {}
    lists = {
        "aircraft": ("variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"),
        "cub200": ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"),
        "cars196": ("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    }
    makers = {"aircraft": trees.aircraft_tree, "cub200": trees.cub_tree, "cars196": trees.cars_tree}
    for name, files in lists.items():
        root = makers[name](folder / name, train=1, test=1)
        paths = [next(root.rglob(file)) for file in files]
        originals = [path.read_bytes() for path in paths]
        chosen = config.DataConfig(name=name, root=str(root), image_size=32)

        def load(content: bytes, paths: Any = paths, originals: Any = originals, chosen: Any = chosen) -> None:
            which = content[0] % len(paths) if content else 0
            paths[which].write_bytes(content[1:])
            try:
                found = data.load(chosen)
            finally:
                paths[which].write_bytes(originals[which])
            labels = [label for split in (found.train, found.test) for _, label in split.samples]
            assert all(0 <= label < found.num_classes for label in labels), "a label is no class"

        seeds = [bytes([which]) + original for which, original in enumerate(originals)]
        made[f"{name} tree"] = Parser(load, data.DATASETS[name].layout.title, seeds, (ValueError, data.DatasetNotFound))

    root = folder / "folders"
    picture = next(folder.rglob("*.jpg")).read_bytes()
    name = st.one_of(st.sampled_from(["a", "b", ".hidden", "0.jpg", "1.PNG", "@eaDir", "x.txt", "\udc80.jpg"]),
                     st.text(min_size=1, max_size=3).filter(lambda t: not {"/", "\0"} & set(t)))  # fmt: skip
    entry = st.tuples(st.sampled_from(["train", "test", "val", "other"]), name, name, st.sampled_from([None, picture]))

    def folders(entries: list[tuple[str, str, str, bytes | None]]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for split, label, file, content in entries:
            with contextlib.suppress(OSError, UnicodeEncodeError):
                (root / split / label).mkdir(parents=True, exist_ok=True)
                (root / split / label / file).write_bytes(content or b"")
        found = data.load(config.DataConfig(name="folder", root=str(root), image_size=32, augment=False))
        for split in (found.train, found.test):
            for index in range(len(split)):
                split[index]

    read = _structured(st.lists(entry, min_size=1, max_size=6), folders)
    made["folder tree"] = Parser(read, str(folder), refusals=(ValueError, data.DatasetNotFound))
    return made


def _images(folder: Path) -> dict[str, Parser]:
    path, seeds = folder / "image", []
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    kinds = {"PNG": ("RGB", "L", "P", "1", "I;16", "RGBA"), "TIFF": ("RGB", "F", "I;16", "CMYK"), "GIF": ("P",)}
    kinds |= {"JPEG": ("RGB", "CMYK"), "BMP": ("RGB",), "WEBP": ("RGB",), "PPM": ("L",), "TGA": ("RGB",)}
    for form, modes in kinds.items():
        for mode in modes:
            (noise.convert("I").convert(mode) if mode == "I;16" else noise.convert(mode)).save(b := io.BytesIO(), form)
            seeds.append(b.getvalue())
    item = image_data.ImageFiles([(path, 0)], evaluation_transform(8))

    def image(content: bytes) -> None:
        path.write_bytes(content)
        pixels, _ = item[0]
        assert pixels.shape == (3, 8, 8)
        assert pixels.isfinite().all(), f"reads {pixels}"

    return {"image": Parser(image, str(path), seeds, share=2)}


def _texts(folder: Path) -> dict[str, Parser]:
    """Small files and strings."""
    listed, result, shapes = folder / "list.txt", folder / "result.json", folder / "shapes.yaml"
    layout = published.CUB200.layout

    def lines(content: bytes) -> None:
        listed.write_bytes(content)
        assert all(key and rest for key, (_, rest) in layout.mapping(listed).items())

    def read_results(content: bytes) -> None:
        result.write_bytes(content)
        json.dumps(results.read_results(result), allow_nan=False)

    def read_shapes(content: bytes) -> None:
        shapes.write_bytes(content)
        bench.from_file(shapes)

    recipe = rendered._Recipe(split="train", seed=0, size=32, classes=2, per_class=1)
    cache = folder / f"{recipe.stem}.npy"
    images = np.zeros(recipe.shape, np.uint8)
    np.save(array := io.BytesIO(), images)

    def read_cache(content: bytes) -> None:
        cache.write_bytes(content)
        with mock.patch.object(rendered, "_draw_all", lambda recipe, path, workers: np.save(path, images)):
            assert rendered._cached(recipe, folder, 0).shape == recipe.shape

    history = b'{"rounds": {"round": [0, 1], "loss": [1.5, null]}, "name": "x"}'
    text = b"1 001.Black_footed/a.jpg\r\n2 b c\n"
    return {
        "path": Parser(lambda b: config.expand(b.decode("utf-8", "surrogateescape")), "", [b"~/a", b"$HOME/${X}"]),
        "annotation lines": Parser(lines, listed.name, [text, text.decode().encode("utf-16")], share=4),
        "results JSON": Parser(read_results, result.name, [history, b"[" * 50, b"NaN"], share=4),
        "shapes of benchmarks": Parser(read_shapes, shapes.name, [b"distillation_kl: [[512, 100], {rows: 2}]"]),
        "cache of images": Parser(read_cache, cache.name, [array.getvalue()[:200]]),
    }


def _configs(folder: Path) -> dict[str, Parser]:
    path, out = folder / "config.yaml", folder / "checkpoints"
    names = st.sampled_from(list(_paths_of(config.ExperimentConfig)))
    named = st.sampled_from(["digits", "eager", "fp32", "wrn_40_2", "sfcl", "kd", "~", "1e3", "auto", "cpu", "\ud800"])
    values = st.dictionaries(names, st.one_of(named, VALUES), max_size=4)

    def read(changes: dict[tuple[str, ...], Any]) -> None:
        path.write_text(yaml.safe_dump(_nested(changes)), encoding="utf-8", errors="replace")
        found = config.read(config.ExperimentConfig, path)
        assert isinstance(yaml.safe_dump(config.to_dict(found)), str)

    parser = cli.create_parser()
    commands = {name: (lambda *a, **k: None, used) for name, (_, used) in cli.COMMANDS.items()}

    def main(arguments: Sequence[str]) -> None:
        errors = io.StringIO()
        try:
            with (
                mock.patch.object(cli, "create_parser", return_value=parser),
                mock.patch.object(cli, "COMMANDS", commands),
                contextlib.redirect_stderr(errors),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                cli.main(arguments)
        except SystemExit as end:
            if end.code == 2 and not isinstance(end.__cause__, RecursionError | MemoryError | UnicodeError):
                raise ValueError(errors.getvalue()) from end.__cause__
            if end.code not in (None, 0):
                raise

    def config_file(content: bytes) -> None:
        path.write_bytes(content)
        main(["distill", "--config", str(path)])

    words = ["--config", str(path), "--data.name", "digits", "--data", "{", "--help", "--out", "--bogus", "--teacher"]
    words += ["--distill.loop", "--distill.mean", "[0,1,2]", "--teacher.name=x", "--seed", "1e400", "null", "--weights"]
    argument = st.one_of(st.sampled_from(words), st.text(max_size=6), VALUES.map(str))
    line = st.tuples(st.sampled_from(list(cli.COMMANDS)), st.lists(argument, max_size=5))
    run = tiny.config()
    saved = checkpoint.Checkpoints(out, run, "teacher")
    whole = {"format": checkpoint.FORMAT, **saved.identity, "settings": saved.settings, "state": {"position": [1, 0]}}

    def resume(changes: dict[tuple[str, ...], Any]) -> None:
        out.mkdir(exist_ok=True)
        broken = {**whole, **_nested(changes)}
        (out / "round-000001-step-0000.pt").write_bytes(_saved(broken))
        found = saved.newest()
        assert broken["format"] == checkpoint.FORMAT, f"accepts the format {broken['format']}"
        assert found == broken["state"]

    key = st.one_of(st.sampled_from([(name,) for name in whole]), names.map(lambda each: ("settings", *each[1:])))
    contents = st.dictionaries(key.filter(bool), VALUES, min_size=1, max_size=2)
    example = yaml.safe_dump({"student": {"name": "resnet8"}, "distill": {"mean": [0.5, 0.5, 0.5]}}).encode()
    return {
        "config values": Parser(_structured(values, read), path.name, share=2),
        "config file": Parser(config_file, "error: ", [example, b"a: &x [*x]"]),
        "command line": Parser(_structured(line, lambda each: main([each[0], *each[1]])), "error: ", share=2),
        "checkpoint": Parser(_structured(contents, resume), "", refusals=(checkpoint.CheckpointError,)),
    }


class _Shared:
    """Counts and the current input, in memory that outlives the process."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 24 + self.SIZE)

    def start(self, content: bytes) -> None:
        kept = content[: self.SIZE]
        struct.pack_into("<q", self.memory, 16, len(kept))
        self.memory[24 : 24 + len(kept)] = kept

    def end(self, refused: bool) -> None:
        at = 8 if refused else 0
        struct.pack_into("<q", self.memory, at, struct.unpack_from("<q", self.memory, at)[0] + 1)

    def counts(self) -> tuple[int, int]:
        return struct.unpack_from("<qq", self.memory)

    def current(self) -> bytes:
        return self.memory[24 : 24 + struct.unpack_from("<q", self.memory, 16)[0]]


def _fault(parser: Parser, content: bytes) -> tuple[bool | None, BaseException | None]:
    """Whether an input is refused (None if it encodes no value), and the error if it is no documented one."""
    try:
        result = parser.read(content)
    except BaseException as error:
        clear = type(error) in parser.refusals and str(error).strip() and parser.names in str(error).splitlines()[0]
        return True, None if clear else error
    return None if result is INVALID else False, None


def _fuzz(parser: Parser, seed: int, corpus: Path, shared: _Shared, faults: Path, log: Path) -> None:
    """Make inputs for ever, in a forked process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    logging.disable()
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + 2**31,) * 2)  # a bomb raises MemoryError
    known: set[Any] = set()

    def one(content: bytes) -> None:
        shared.start(content)
        refused, error = _fault(parser, content)
        if refused is not None:
            shared.end(refused)
        if error is not None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            if (key := (type(error), where.filename, where.lineno)) not in known and len(known) < 10:
                known.add(key)
                text = f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
                with faults.open("a") as file:
                    file.write(json.dumps(f"{text}; input {content[:400]!r}") + "\n")

    options = [
        f"-seed={seed}",
        "-max_len=4096",
        "-timeout=0",
        "-rss_limit_mb=0",
        "-len_control=0",
        f"-artifact_prefix={corpus}-",
        "-detect_leaks=0",
    ]
    import atheris

    atheris.Setup(["fuzz", *options, str(corpus)], one)
    atheris.Fuzz()


def _instrument() -> None:
    """Count the branches of the parsers, so that the fuzzer keeps inputs that take new ones."""
    import atheris

    modules = (bench, checkpoint, cli, config, image_data, published, registry, rendered, results, weights)
    owners = [*modules, *(each for module in modules for each in vars(module).values() if isinstance(each, type))]
    for function in [getattr(each, "__func__", each) for owner in owners for each in vars(owner).values()]:
        if isinstance(function, types.FunctionType) and function.__module__ in [module.__name__ for module in modules]:
            atheris.instrument_func(function)


def _case(tally: Tally, kind: str, parser: Parser, seed: int, corpus: Path, seconds: float) -> None:
    """Fuzz one parser for some seconds."""
    shared, faults, log = _Shared(), corpus.with_suffix(".faults"), corpus.with_suffix(".log")
    faults.write_text("")
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            _fuzz(parser, seed, corpus, shared, faults, log)
        os._exit(1)
    end, last, moved, ended = time.monotonic() + seconds, -1, time.monotonic(), 0
    while not ended:
        time.sleep(0.05)
        ended, status = os.waitpid(process, os.WNOHANG)
        if (now := sum(shared.counts())) != last:
            last, moved = now, time.monotonic()
            if now and time.monotonic() > end:
                break
        elif time.monotonic() > moved + HANG_S:
            tally.lose(kind, f"no result after {HANG_S} s; input {shared.current()[:400]!r}" + log.read_text()[-3000:])
            break
    if ended:
        tail = log.read_text(errors="replace")[-9500:]
        tally.lose(
            kind,
            f"it crashed (status {os.waitstatus_to_exitcode(status)}); input {shared.current()[:400]!r}\n{tail}",
        )
    else:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    for reason in {json.loads(line) for line in faults.read_text().splitlines()}:
        tally.lose(kind, reason)
    for outcome, times in zip(("accepted", "refused with a reason"), shared.counts(), strict=True):
        tally.count(kind, outcome, times=times)


def run(tally: Tally) -> None:
    """Fuzz the parsers in turn."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tally.folder))
    try:
        _instrument()
        parsers = {k: p for make in (_weights, _trees, _images, _texts, _configs) for k, p in make(folder).items()}
        only = os.environ.get("ONLY")
        parsers = {k: v for k, v in parsers.items() if not only or only in k}
        for number, parser in enumerate(parsers.values()):
            (folder / f"corpus-{number}").mkdir()
            for index, seed in enumerate(parser.seeds):
                (folder / f"corpus-{number}" / f"seed-{index}").write_bytes(seed)
        pace = 0.9 * min(tally.seconds, ROUND_S) / sum(parser.share for parser in parsers.values())
        # Every parser once, and then until the time is over.
        rounds = [tally.cases(0.0) for _ in parsers if tally.only is None]
        for rng in itertools.chain(*rounds, tally.cases()):
            number = tally.index % len(parsers)
            kind, parser = list(parsers.items())[number]
            corpus = folder / f"corpus-{number}"
            _case(tally, kind, parser, int(rng.integers(1, 2**31)), corpus, pace * parser.share)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
