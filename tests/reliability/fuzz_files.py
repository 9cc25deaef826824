"""Fuzzes what reads files, paths and command lines, guided by coverage (atheris) and structure (Hypothesis).

A case gives one parser to a forked process, which makes inputs for some seconds. Each input must be accepted, or be
refused with a documented error whose first line names the file.
"""

from __future__ import annotations

import contextlib
import copy
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
DEEP = b"[" * 4000
NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**63, 10**30, 1e-320]), st.booleans())
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=8)),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)


@dataclass(frozen=True)
class Parser:
    """Reads inputs. A refusal has exactly one of these types, and names the file; ``share`` is one of the time."""

    read: Callable[[bytes], object]
    names: str
    seeds: Sequence[bytes] = ()
    refusals: tuple[type[BaseException], ...] = (ValueError,)
    share: float = 1.0


def _file(path: Path, read: Callable[[Path], object], *seeds: bytes, **options: Any) -> Parser:
    return Parser(lambda content: [path.write_bytes(content), read(path)], path.name, seeds, **options)


def _structured(strategy: Any, read: Callable[[Any], object], names: str, **options: Any) -> Parser:
    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def test(value: Any) -> None:
        read(value)

    fuzz = test.hypothesis.fuzz_one_input
    return Parser(lambda content: INVALID if fuzz(content) is None else None, names, **options)


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Replace values of nested dicts, by dotted names."""
    values = copy.deepcopy(values)
    for name, value in changes.items():
        *path, last = name.split(".")
        owner = values
        for key in path:
            owner = owner[key]
        owner[last] = value
    return values


def _saved(content: Any, **options: Any) -> bytes:
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def _weights(folder: Path) -> dict[str, Parser]:
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), folder / "w.safetensors"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    weights.save_weights(model, path, {"model": "m", "num_classes": "3", "mean": "0.5"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")

    def load(path: Path) -> None:
        model.load_state_dict(state)
        try:
            report = weights.load_weights(model, path)
        except Exception:
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "changed"
            raise
        assert all(value.isfinite().all() for value in model.state_dict().values()), "loads non-finite weights"
        assert {*report.loaded, *report.absent_counters} == {*state}, "does not load all weights"

    def header(head: bytes) -> None:
        path.write_bytes(len(head).to_bytes(8, "little") + head + content[start:])
        load(path)

    def described(values: bytes) -> None:
        metadata = dict(zip(weights._FIELDS, values.decode("latin-1").split("\n"), strict=False))
        head = json.dumps({"__metadata__": metadata}).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head)
        found = weights.read_description(path)
        assert all(map(math.isfinite, (*(found.mean or ()), *(found.std or ())))), f"accepts {found}"

    def pickled(content: Any) -> None:
        (folder / "w.pt").write_bytes(_saved(content))
        load(folder / "w.pt")
        assert not any(torch.is_tensor(value) and value.is_complex() for value in content.values()), "loads complex"

    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
    kinds += [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8]
    forms = [
        lambda t: t,
        lambda t: t.to_sparse(),
        lambda t: t.to("meta"),
        nn.Parameter,
        lambda t: t.t() if t.ndim < 3 else t,
    ]
    tensor = st.builds(
        lambda t, kind, form, shift: form((t + shift).to(kind)),
        st.sampled_from([*state.values(), torch.zeros(0), torch.zeros(3, 1)]),
        *(st.sampled_from(each) for each in (kinds, forms, [0, 0, math.nan, math.inf, 1e30])),
    )
    names = st.sampled_from([*state, *(f"module.{name}" for name in state), "model.0.weight", "", "\ud800", "module"])
    keys = st.one_of(names, names, st.integers(), st.none(), st.tuples(st.text(max_size=2)))
    flat = st.dictionaries(keys, st.one_of(tensor, VALUES), max_size=3).map(lambda new: {**state, **new})
    nested = st.recursive(flat, lambda each: st.dictionaries(st.sampled_from(weights._NESTED), each, max_size=2))
    options: Any = {"refusals": (weights.WeightsFormatError, weights.WeightsMismatch, ValueError)}
    values = b'3\n["a", "b", "c"]\n32\n[0.5, 0.5, 0.5]\n[0.5]\n{"widths": [4]}'
    legacy = _saved({"state_dict": state}, _use_new_zipfile_serialization=False)
    return {
        "safetensors file": _file(path, load, content, share=2, **options),
        "safetensors header": Parser(header, path.name, [content[8:start], DEEP], share=2, **options),
        "weights metadata": Parser(described, path.name, [values, DEEP], share=3, **options),
        "torch weights file": _file(folder / "w.pt", load, _saved(state), legacy, **options),
        "state dict": _structured(nested, pickled, "w.pt", **options),
    }


def _data(folder: Path) -> dict[str, Parser]:
    parsers: dict[str, Parser] = {}
    for name, make in (("aircraft", trees.aircraft_tree), ("cub200", trees.cub_tree), ("cars196", trees.cars_tree)):
        root = make(folder / name, train=1, test=1)
        originals = {path: path.read_bytes() for suffix in ("txt", "mat") for path in sorted(root.rglob(f"*.{suffix}"))}
        chosen = config.DataConfig(name=name, root=str(root), image_size=32)

        def load(content: bytes, originals: Any = originals, chosen: Any = chosen) -> None:
            """The first byte selects the annotation file that the others replace."""
            path = list(originals)[(content or b"\0")[0] % len(originals)]
            path.write_bytes(content[1:])
            try:
                found = data.load(chosen)
            finally:
                path.write_bytes(originals[path])
            labels = [label for split in (found.train, found.test) for _, label in split.samples]
            assert all(0 <= label < found.num_classes for label in labels), "a label is no class"

        seeds = [bytes([i]) + content for i, content in enumerate(originals.values())]
        refusals = (ValueError, data.DatasetNotFound)
        parsers[f"{name} tree"] = Parser(load, data.DATASETS[name].layout.title, seeds, refusals)

    tree, picture = folder / "folders", next(folder.rglob("*.jpg")).read_bytes()
    odd = st.sampled_from(["a", "b", ".hidden", "0.jpg", "1.PNG", "@eaDir", "\udc80.jpg"])
    name = st.one_of(odd, st.text(min_size=1, max_size=3))
    label, file = st.sampled_from("ab") | name, st.just("0.jpg") | name
    entry = st.tuples(st.sampled_from(["train", "test", "val"]), label, file, st.sampled_from([picture, picture, b""]))

    def folders(entries: Any) -> None:
        shutil.rmtree(tree, ignore_errors=True)
        for split, label, file, content in entries:
            with contextlib.suppress(OSError, ValueError):
                (tree / split / label).mkdir(parents=True, exist_ok=True)
                (tree / split / label / file).write_bytes(content)
        found = data.load(config.DataConfig(name="folder", root=str(tree), image_size=32, augment=False))
        for split in (found.train, found.test):
            _ = [split[index] for index in range(len(split))]

    parsers["folder tree"] = _structured(st.lists(entry, max_size=6), folders, str(folder), refusals=refusals)
    noise, pictures = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)), []
    for form in ("PNG RGB L P 1 RGBA", "TIFF RGB F CMYK", "GIF P", "JPEG RGB CMYK", "BMP RGB", "WEBP RGB", "PPM L"):
        for mode in form.split()[1:]:
            noise.convert(mode).save(buffer := io.BytesIO(), form.split()[0])
            pictures.append(buffer.getvalue())
    item = image_data.ImageFiles([(folder / "image", 0)], evaluation_transform(8))

    def image(path: Path) -> None:
        assert item[0][0].isfinite().all(), "pixels are not finite"

    recipe = rendered._Recipe(split="train", seed=0, size=32, classes=2, per_class=1)
    images = np.zeros(recipe.shape, np.uint8)
    np.save(array := io.BytesIO(), images)

    def cache(path: Path) -> None:
        with mock.patch.object(rendered, "_draw_all", lambda recipe, path, workers: np.save(path, images)):
            assert rendered._cached(recipe, folder, 0).shape == recipe.shape

    text = b"1 001.Black_footed/a.jpg\r\n2 b c\n"
    lines = [text, text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text]
    return parsers | {
        "image": _file(folder / "image", image, *pictures, share=2),
        "cache of images": _file(folder / f"{recipe.stem}.npy", cache, array.getvalue()[:200]),
        "annotation lines": _file(folder / "list.txt", published.CUB200.layout.mapping, *lines, share=4),
    }


def _settings(folder: Path) -> dict[str, Parser]:
    def read(changes: dict[str, Any]) -> None:
        path.write_text(yaml.safe_dump(_changed(whole, changes)))
        config.to_dict(config.read(config.ExperimentConfig, path))

    def main(arguments: Sequence[str]) -> None:
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
                cli.main(arguments)
        except SystemExit as end:
            if end.code == 2 and not isinstance(end.__cause__, RecursionError | UnicodeError):
                raise ValueError(errors.getvalue()) from end.__cause__
            if end.code:
                raise

    def config_file(content: bytes) -> None:
        path.write_bytes(content)
        main(["distill", "--config", str(path)])

    def resume(changes: dict[str, Any]) -> None:
        broken = _changed(kept, changes)
        (folder / "round-000001-step-0000.pt").write_bytes(_saved(broken))
        assert run.newest() == broken["state"]
        assert broken["format"] == checkpoint.FORMAT, "accepts another format"

    model = config.ModelConfig(name="resnet8")
    path, whole = folder / "config.yaml", config.to_dict(config.ExperimentConfig(teacher=model, student=model))
    run = checkpoint.Checkpoints(folder, tiny.config(), "teacher")
    kept = {"format": checkpoint.FORMAT, **run.identity, "settings": run.settings, "state": {"position": [1, 0]}}
    parser = cli.create_parser()
    cli.COMMANDS = {name: (lambda *a, **k: None, used) for name, (_, used) in cli.COMMANDS.items()}
    cli.create_parser = lambda: parser  # creating it takes longer than using it
    words = ["--config", str(path), "--data.name", "digits", "--data", "{", "--help", "--out", "--bogus", "--teacher"]
    words += ["--distill.loop", "--distill.mean", "[0,1,2]", "--teacher.name=x", "--seed", "1e400", "null", "--weights"]
    word = st.one_of(st.sampled_from(words), st.text(max_size=6), VALUES.map(str))
    line = st.builds(lambda command, rest: [command, *rest], st.sampled_from([*cli.COMMANDS]), st.lists(word))
    value = st.one_of(st.sampled_from(["digits", "eager", "fp32", "kd", "~", "1e3", "auto", "cpu"]), VALUES)
    changes, content = (
        st.dictionaries(st.sampled_from([*checkpoint._flat(each), *each]), value, min_size=1, max_size=1)
        for each in (whole, kept)
    )
    history = b'{"rounds": {"round": [0, 1], "loss": [1.5, null]}, "name": "x"}'
    json_seeds = (history, b'{"a": NaN}', b'{"a": 1e999}', DEEP)
    example = yaml.safe_dump({"student": {"name": "resnet8"}, "distill": {"mean": [0.5, 0.5, 0.5]}}).encode()
    expand = Parser(lambda b: config.expand(b.decode("utf-8", "surrogateescape")), "", [b"~/a", b"$HOME/${X}"])
    return {
        "path": expand,
        "results JSON": _file(
            folder / "r.json", lambda p: json.dumps(results.read_results(p), allow_nan=False), *json_seeds, share=4
        ),
        "shapes of benchmarks": _file(
            folder / "s.yaml", bench.from_file, b"distillation_kl: [[5, 10], {rows: 2}]", DEEP
        ),
        "config values": _structured(changes, read, path.name),
        "config file": Parser(config_file, "error: ", [example, b"a: &x [*x]", DEEP]),
        "command line": _structured(line, main, "error: "),
        "checkpoint": _structured(content, resume, str(folder), refusals=(checkpoint.CheckpointError,)),
    }


class Shared:
    """Counts of two outcomes and the current input, in memory that outlives a process."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 1 << 13)

    def start(self, content: bytes) -> None:
        struct.pack_into("<q4096s", self.memory, 16, len(content), content)

    def end(self, outcome: int) -> None:
        struct.pack_into("<q", self.memory, 8 * outcome, self.counts()[outcome] + 1)

    def counts(self) -> tuple[int, ...]:
        return struct.unpack_from("<qq", self.memory)

    def watch(self, work: Callable[[], None], seconds: float) -> str:
        """Run ``work`` in a forked process for some seconds. Return what went wrong, or an empty string."""
        if (process := os.fork()) == 0:
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        begin = moved = time.monotonic()
        count, problem = -1, None
        while problem is None:
            time.sleep(0.02)
            now = time.monotonic()
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                return f"it ended with status {os.waitstatus_to_exitcode(status)}; {self.current()}" if status else ""
            if sum(self.counts()) != count:
                count, moved = sum(self.counts()), now
                problem = "" if count and now > begin + seconds else None
            elif now > moved + HANG_S:
                problem = f"no result after {HANG_S} s; {self.current()}"
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return problem

    def current(self) -> str:
        length, content = struct.unpack_from("<q4096s", self.memory, 16)
        return f"input {content[:length][:500]!r}"


def _verdict(parser: Parser, content: bytes) -> tuple[int | None, BaseException | None]:
    """0 if accepted, 1 if refused, None if the bytes encode no value; and an error that is not documented."""
    try:
        return (None if parser.read(content) is INVALID else 0), None
    except BaseException as error:
        clear = type(error) in parser.refusals and parser.names in (str(error).splitlines() or [""])[0]
        return 1, None if clear and str(error).strip() else error


def _fuzz(parser: Parser, seed: int, corpus: Path, shared: Shared) -> None:
    """Make inputs until the process is killed. Each kind of fault is written to a file once."""
    import atheris

    log = os.open(f"{corpus}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    logging.disable()
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + 2**31,) * 2)  # bombs raise MemoryError
    known: set[str] = set()

    def one(content: bytes) -> None:
        shared.start(content)
        outcome, error = _verdict(parser, content)
        if outcome is not None:
            shared.end(outcome)
        if error is not None:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} ({where.filename}:{where.lineno})"
            if kind not in known and len(known) < 10:
                known.add(kind)
                with open(f"{corpus}.faults", "a") as file:
                    file.write(json.dumps(f"{kind}: {str(error)[:300]}; {shared.current()}") + "\n")

    options = [f"-seed={seed}", "-max_len=4096", "-timeout=3600", "-rss_limit_mb=0", "-len_control=0"]
    atheris.Setup(["fuzz", *options, "-detect_leaks=0", f"-artifact_prefix={corpus}.", str(corpus)], one)
    atheris.Fuzz()


def _instrument() -> None:
    """Count branches of the parsers, so that the fuzzer keeps inputs that take new ones."""
    import atheris

    modules = (bench, checkpoint, cli, config, image_data, published, registry, rendered, results, weights)
    owners = [*modules, *(each for module in modules for each in vars(module).values() if isinstance(each, type))]
    for function in [getattr(each, "__func__", each) for owner in owners for each in vars(owner).values()]:
        if isinstance(function, types.FunctionType) and function.__module__ in {module.__name__ for module in modules}:
            atheris.instrument_func(function)


def run(tally: Tally) -> None:
    """Fuzz every parser once, and again until the time is over."""
    try:
        _instrument()
    except ImportError:
        return tally.skip("parsers", "atheris is not installed")
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else tally.folder))
    try:
        parsers = list((_weights(folder) | _data(folder) | _settings(folder)).items())
        pace = 0.9 * min(tally.seconds, 300) / sum(parser.share for _, parser in parsers)
        rounds = [tally.cases(0.0) for _ in parsers if tally.only is None]
        for rng in itertools.chain(*rounds, tally.cases()):
            kind, parser = parsers[tally.index % len(parsers)]
            corpus, shared = folder / f"corpus {kind}", Shared()
            corpus.mkdir(exist_ok=True)
            for index, seed in enumerate(parser.seeds):
                (corpus / f"seed-{index}").write_bytes(seed)
            faults = Path(f"{corpus}.faults")
            faults.write_text("")
            seed = int(rng.integers(1, 2**31))
            problem = shared.watch(lambda: _fuzz(parser, seed, corpus, shared), pace * parser.share)  # noqa: B023
            for reason in [*map(json.loads, faults.read_text().splitlines()), *([problem] if problem else [])]:
                tally.lose(kind, reason)
            tally.count(kind, "accepted", times=shared.counts()[0])
            tally.count(kind, "refused with a reason", times=shared.counts()[1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
