"""Fuzzes what reads files, paths and commands, guided by coverage (atheris) and structure (Hypothesis).

Each input is accepted, or refused with a documented error whose first line names the file.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dfkd_fast import cli, config, data, engine, models, report
from dfkd_fast.benchmarks.ops import bench

from ..data import trees
from .harness import Lost, Tally, command, forked

HANG_S = 30
OPTIONS = ("-max_len=4096", f"-timeout={HANG_S}", "-rss_limit_mb=0", "-len_control=0", "-detect_leaks=0")
INSTRUMENTED = ("data.", "models.weights", "report.results", "engine.checkpoint", "config", "cli", "benchmarks.ops.")
NUMBERS = st.integers() | st.floats() | st.booleans() | st.sampled_from([2**63, 10**30, 1e-320])
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=8),
    lambda each: st.lists(each, max_size=4) | st.dictionaries(st.text(max_size=4), each, max_size=3),
    max_leaves=6,
)


class Parser(NamedTuple):
    """``read`` returns False for bytes that encode no input. A refusal has exactly one of the types of ``refusals``."""

    read: Callable[[bytes], object]
    names: str
    seeds: Sequence[bytes] = ()
    refusals: tuple[type[BaseException], ...] = (ValueError,)


def _file(path: Path, read: Callable[[Path], object], *seeds: bytes, **options: Any) -> Parser:
    return Parser(lambda content: [path.write_bytes(content), read(path)], path.name, seeds, **options)


def _structured(strategy: Any, read: Callable[[Any], object], names: str, **options: Any) -> Parser:
    test = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(read))
    return Parser(lambda content: test.hypothesis.fuzz_one_input(content) is not None, names, **options)


def _saved(content: Any, **options: Any) -> bytes:
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def _weights(folder: Path) -> dict[str, Parser]:
    torch.manual_seed(0)
    model, path, saved = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), folder / "w.safetensors", folder / "w.pt"
    state = {name: value.clone() for name, value in model.state_dict().items()}
    models.save_weights(model, path, {"model": "m", "num_classes": "3", "mean": "0.5"})
    start = 8 + int.from_bytes((content := path.read_bytes())[:8], "little")

    def load(path: Path) -> None:
        model.load_state_dict(state)
        try:
            models.load_weights(model, path)
        except Exception:
            assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "changed"
            raise
        assert all(value.isfinite().all() for value in model.state_dict().values()), "loads non-finite weights"

    def header(head: bytes, tensors: bytes = content[start:]) -> None:
        path.write_bytes(len(head).to_bytes(8, "little") + head + tensors)
        load(path) if tensors else models.read_description(path)

    def described(values: bytes) -> None:
        pairs = zip(models.weights._FIELDS, values.decode("latin-1").split("\n"), strict=False)
        header(json.dumps({"__metadata__": dict(pairs)}).encode(), b"")

    def pickled(content: dict[Any, Any]) -> None:
        saved.write_bytes(_saved(content))
        load(saved)
        assert not any(torch.is_tensor(value) and value.is_complex() for value in content.values()), "loads complex"

    kinds = [torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]
    forms = [lambda t: t, lambda t: t.float().to_sparse(), lambda t: t.to("meta"), lambda t: t.flatten()]
    tensor = st.builds(
        lambda t, kind, form, shift: form((t + shift).to(kind)).requires_grad_(False),
        *(st.sampled_from(x) for x in ([*state.values(), torch.zeros(0)], kinds, forms, [0, 0, math.nan, 1e30])),
    )
    names = st.sampled_from([*state, *(f"module.{name}" for name in state), "model.0.weight", "", "\ud800", "module"])
    keys = names | st.integers() | st.none() | st.tuples(st.text(max_size=2))
    flat = st.dictionaries(keys, tensor | VALUES, max_size=3).map(lambda new: {**state, **new})
    nested = st.recursive(flat, lambda x: st.dictionaries(st.sampled_from(models.weights._NESTED), x, max_size=2))
    refusals: Any = {"refusals": (models.WeightsFormatError, models.WeightsMismatch, ValueError)}
    values = b'3\n["a", "b", "c"]\n32\n[0.5, 0.5, 0.5]\n[0.5]\n{"widths": [4]}'
    legacy = _saved({"state_dict": state}, _use_new_zipfile_serialization=False)
    return {
        "safetensors file": _file(path, load, content, **refusals),
        "safetensors header": Parser(header, path.name, [content[8:start]], **refusals),
        "weights metadata": Parser(described, path.name, [values, b"[" * 4000], **refusals),
        "torch weights file": _file(saved, load, _saved(state), legacy, **refusals),
        "state dict": _structured(nested, pickled, saved.name, **refusals),
    }


def _data(folder: Path) -> dict[str, Parser]:
    parsers, refusals = {}, (ValueError, data.DatasetNotFound)
    for name, make in {"aircraft": trees.aircraft_tree, "cub200": trees.cub_tree, "cars196": trees.cars_tree}.items():
        root = make(folder / name, train=1, test=1)
        originals = {path: path.read_bytes() for path in sorted(chain(root.rglob("*.txt"), root.rglob("*.mat")))}

        def load(content: bytes, originals: Any = originals, name: str = name, root: Path = root) -> None:
            """The first byte selects the annotation file that the others replace."""
            path = list(originals)[(content or b"\0")[0] % len(originals)]
            path.write_bytes(content[1:])
            try:
                found = data.load(config.DataConfig(name=name, root=str(root), image_size=32))
            finally:
                path.write_bytes(originals[path])
            labels = [label for split in (found.train, found.test) for _, label in split.samples]
            assert all(0 <= label < found.num_classes for label in labels), "a label is no class"

        seeds = [bytes([i]) + content for i, content in enumerate(originals.values())]
        parsers[f"{name} tree"] = Parser(load, data.DATASETS[name].layout.title, seeds, refusals)

    tree, picture = folder / "folders", next(folder.rglob("*.jpg")).read_bytes()
    odd = st.sampled_from(["a", ".hidden", "0.jpg", "1.PNG", "@eaDir", "\udc80.jpg"]) | st.text(min_size=1, max_size=3)
    entry = st.tuples(st.sampled_from(["train", "test", "val"]), odd, odd, st.sampled_from([picture, b""]))

    def folders(entries: Any) -> None:
        shutil.rmtree(tree, ignore_errors=True)
        for split, label, file, content in [(split, "a", "0.jpg", picture) for split in ("train", "test")] + entries:
            with contextlib.suppress(OSError, ValueError):
                (tree / split / label).mkdir(parents=True, exist_ok=True)
                (tree / split / label / file).write_bytes(content)
        found = data.load(config.DataConfig(name="folder", root=str(tree), image_size=32, augment=False))
        assert [split[i] for split in (found.train, found.test) for i in range(len(split))]

    parsers["folder tree"] = _structured(st.lists(entry, max_size=3), folders, str(folder), refusals=refusals)
    noise, pictures = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)), [picture]
    forms = {"PNG": "RGB L P 1 RGBA", "TIFF": "RGB F CMYK", "GIF": "P", "JPEG": "CMYK", "BMP": "RGB", "WEBP": "RGB"}
    for form, mode in [(form, mode) for form, modes in forms.items() for mode in modes.split()]:
        noise.convert(mode).save(buffer := io.BytesIO(), form)
        pictures.append(buffer.getvalue())
    item = data.image_data.ImageFiles([(folder / "image", 0)], data.published.evaluation_transform(8))
    image = _file(folder / "image", lambda path: item[0][0].isfinite().all() or 1 / 0, *pictures)
    recipe = data.rendered._Recipe(split="train", seed=0, size=32, classes=1, per_class=1)
    file = folder / f"{recipe.stem}.npy"

    def cache(content: bytes) -> None:
        file.write_bytes(content + data.rendered._checksum(content, file))
        images = data.rendered._cached(recipe, folder, 0)
        assert (images.shape, images.dtype) == (recipe.shape, np.uint8), "other images"

    data.rendered._cached(recipe, folder, 0)
    return parsers | {"image": image, "cache of images": Parser(cache, file.name, [file.read_bytes()[:-16]])}


def _settings(folder: Path) -> dict[str, Parser]:
    path, parser, model = folder / "config.yaml", cli.create_parser(), config.ModelConfig(name="resnet8")
    whole = config.to_dict(config.ExperimentConfig(teacher=model, student=model, data=config.DataConfig()))
    cli.COMMANDS = {name: (lambda *a, **k: None, used) for name, (_, used) in cli.COMMANDS.items()}
    cli.create_parser = lambda: parser  # creating it takes longer than using it
    value = st.sampled_from(["digits", "eager", "fp32", "kd", "~", "1e400", "auto", "cpu", "{", "[0,1,2]"]) | VALUES
    name = st.sampled_from([*whole, *engine.checkpoint._flat(whole), "out", "help", "bogus", "config", "weights"])
    line = st.lists(st.builds("--{}={}".format, name, value) | st.text(max_size=6), max_size=4)
    arguments = st.builds(lambda name, rest: [name, *rest], st.sampled_from([*cli.COMMANDS]), line)
    example = yaml.safe_dump({"student": {"name": "resnet8"}, "distill": {"mean": [0.5, 0.5, 0.5]}}).encode()
    config_file = _file(path, lambda path: command(["distill", "--config", str(path)]), example, b"a: &x [*x]")
    history = (b'{"rounds": {"loss": [1.5, null]}, "name": "x"}', b'{"a": NaN}', b'{"a": 1e999}', b"[" * 4000)
    results = _file(folder / "r.json", lambda p: json.dumps(report.read_results(p), allow_nan=False), *history)
    return {
        "results JSON": results,
        "shapes of benchmarks": _file(folder / "s.yaml", bench.from_file, b"distillation_kl: [[5, 10], {rows: 2}]"),
        "config file": config_file._replace(names="error: "),
        "command line": _structured(arguments, command, "error: "),
    }


def _fuzz(parser: Parser, seed: int, corpus: Path, send: Callable[[Any], None]) -> None:
    """Make inputs in a forked process, and send their outcomes with the reason of each new kind of loss."""
    import atheris

    log = os.open(f"{corpus}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31,) * 2)  # bombs raise MemoryError
    known: set[str] = set()

    def one(content: bytes) -> None:
        outcome, reason = "", ""
        try:
            outcome = "" if parser.read(content) is False else "accepted"
        except BaseException as error:
            outcome, first = "refused with a reason", (str(error).splitlines() or [""])[0]
            if type(error) not in parser.refusals or not first or parser.names not in first:
                where = traceback.extract_tb(error.__traceback__)[-1]
                outcome, kind = "", f"{type(error).__name__} ({where.filename}:{where.lineno}): {first[:30]}"
                reason = "" if kind in known else f"{kind}{str(error)[30:800]}; input {content[:500]!r}"
                known.add(kind)
        if outcome or reason:
            send((outcome, reason))

    options = [f"-seed={seed}", f"-artifact_prefix={corpus}.", *OPTIONS]
    atheris.Setup(["fuzz", *options, str(corpus)], one)
    atheris.Fuzz()


def _instrument() -> None:
    """Count branches of modules, so that the fuzzer keeps inputs that take new ones."""
    import atheris

    for module in [each for name, each in sys.modules.items() if name.partition(".")[2].startswith(INSTRUMENTED)]:
        owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
        for function in [getattr(each, "__func__", each) for owner in owners for each in vars(owner).values()]:
            if hasattr(function, "__code__") and function.__module__ == module.__name__:
                atheris.instrument_func(function)


def _case(tally: Tally, kind: str, parser: Parser, seed: int, corpus: Path, seconds: float) -> None:
    """Fuzz a parser for some seconds, and at least one input."""
    corpus.mkdir(exist_ok=True)
    for index, content in enumerate(parser.seeds):
        (corpus / f"seed-{index}").write_bytes(content)
    end = time.monotonic() + seconds
    try:
        for outcome, reason in forked(partial(_fuzz, parser, seed, corpus), seconds=2 * HANG_S):
            tally.lose(kind, reason) if reason else tally.count(kind, outcome)
            if time.monotonic() > end:
                break
    except Lost as error:
        tally.lose(kind, f"{error}: {Path(f'{corpus}.log').read_text(errors='replace')[-2000:]}")


def run(tally: Tally) -> None:
    """Fuzz one parser per case, each for a share of the time, and again until the time is over."""
    try:
        _instrument()
    except ImportError:
        return tally.skip("parsers", "atheris is not installed")
    folder = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tally.folder) / f"dfkd-fast-fuzz-{os.getpid()}"
    folder.mkdir()
    try:
        parsers = list((_weights(folder) | _data(folder) | _settings(folder)).items())
        pace = max(2.0, 0.9 * min(tally.seconds, 300) / len(parsers))
        for (kind, parser), rng in tally.turns(parsers):
            _case(tally, kind, parser, int(rng.integers(1, 2**31)), folder / f"corpus {kind}", pace)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
