"""The effect of the method's parts and of its open choices: the table of docs/ablation.md.

Each cell is the method with one choice changed, distilled with every seed from the same teacher, which never saw the
held-out images. Seeds go round the cells, so that a table with fewer seeds is complete early. Several cells run at a
time, each in its own process: one leaves most of a GPU idle at this image size.

    python -m dfkd_fast.benchmarks.ablation --out FILE --device cpu --size small
"""

from __future__ import annotations

import concurrent.futures as futures
import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.benchmarks.results import Results, parser
from dfkd_fast.config import (
    DataConfig,
    DistillConfig,
    GeneratorConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    TeachConfig,
    to_dict,
)

__all__ = ["CELLS", "PROFILES", "SEEDS", "Profile", "main", "override", "run_cell", "trained_teacher"]

SEEDS = (0, 1, 2)

Overrides = Mapping[str, Any]

CELLS: Mapping[str, Overrides] = {
    # the paper's table 3
    "baseline": {"objective.preset": "baseline"},
    "+ SFCL": {"objective.student.mhad": 0.0},
    "+ MHAD": {"objective.student.sfcl": 0.0},
    "both": {},
    # order R of the attention (3 is "both")
    "R = 1": {"objective.mhad.order": 1},
    "R = 2": {"objective.mhad.order": 2},
    # the gate ("spatial" is "both"), or none
    "gate spatial_mean1": {"generator.attention": "spatial_mean1"},
    "gate channel": {"generator.attention": "channel"},
    "lambda = 0": {"generator.attention": "none"},
    # what MHAD compares ("features" is "both")
    "MHAD on attention maps": {"objective.mhad.target": "attention"},
    # temperature of SFCL (0.1 is "both")
    "tau = 0.05": {"objective.sfcl.temperature": 0.05},
    "tau = 0.5": {"objective.sfcl.temperature": 0.5},
    # weight of SFCL (8 is "both", 0 is "+ MHAD")
    "gamma = 0.3": {"objective.student.sfcl": 0.3},
    "gamma = 1": {"objective.student.sfcl": 1.0},
    "gamma = 3": {"objective.student.sfcl": 3.0},
    # weight of MHAD (10 is "both"), also with a weaker SFCL
    "beta = 40": {"objective.student.mhad": 40.0},
    "beta = 40, gamma = 0.1": {"objective.student.mhad": 40.0, "objective.student.sfcl": 0.1},
    # the generator's blocks
    "no BatchNorm in blocks": {"generator.batch_norm": False},
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The experiment that the cells vary; ``distill`` is the run of the cell "both"."""

    data: DataConfig
    teacher: ModelConfig
    student: ModelConfig
    teach: TeachConfig
    distill: DistillConfig = field(default_factory=DistillConfig)


_LOOP = LoopConfig(evaluate_every=0, checkpoint_every=1000)

PROFILES = {
    "full": Profile(
        data=DataConfig(name="rendered", image_size=64, classes=20, train_per_class=200, test_per_class=50),
        teacher=ModelConfig(name="resnet32x4"),
        student=ModelConfig(name="resnet8x4"),
        teach=TeachConfig(epochs=40, lr=0.05),
        distill=DistillConfig(
            loop=replace(_LOOP, epochs=4, rounds_per_epoch=40),
            optimizer=OptimizerConfig(student_lr=0.05),
        ),
    ),
    # the demo's experiment (configs/demo_rendered.yaml) with the paper's weights
    "small": Profile(
        data=DataConfig(name="rendered", image_size=32, classes=10, train_per_class=400, test_per_class=50),
        teacher=ModelConfig(name="resnet8", options={"stem_stride": 2, "widths": [24, 24, 48, 96]}),
        student=ModelConfig(name="resnet8", options={"stem_stride": 2}),
        teach=TeachConfig(epochs=15, lr=0.1, channels_last=False),
        distill=DistillConfig(
            channels_last=False,
            generator=GeneratorConfig(latent_dim=128, channels=(64, 64, 64, 32, 16), attention_reduction=16),
            optimizer=OptimizerConfig(student_lr=0.05),
            loop=replace(_LOOP, epochs=4, rounds_per_epoch=20, generator_steps=5, student_steps=10, batch_size=32),
        ),
    ),
}


def override(config: Any, changes: Overrides) -> Any:
    """A config with some of its fields changed, named by dotted paths; the last name may be a key of a dict field.

    Raises:
        ValueError: a path that the config does not have.
    """
    for path, value in changes.items():
        config = _override(config, path.split("."), value, path)
    return config


def _override(config: Any, names: Sequence[str], value: Any, path: str) -> Any:
    name, rest = names[0], names[1:]
    if isinstance(config, dict):
        return {**config, name: _override(config[name], rest, value, path) if rest else value}
    if not is_dataclass(config) or isinstance(config, type) or name not in {item.name for item in fields(config)}:
        raise ValueError(f"{path} is not a field of the config: {type(config).__name__} has no {name!r}")
    return replace(config, **{name: _override(getattr(config, name), rest, value, path) if rest else value})


def _digest(profile: Profile) -> str:
    """Names the profile's teacher: changes with the images, the network and its training."""
    parts = [to_dict(part) for part in (profile.data, profile.teacher, profile.teach)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def trained_teacher(profile: Profile, device: str, folder: Path | None = None) -> tuple[Path, float]:
    """Weights of the profile's teacher and its accuracy; trained on the first call and kept in ``folder``.

    Without a folder they are kept in the machine's folder for temporary files.
    """
    from dfkd_fast import data
    from dfkd_fast.engine import teach
    from dfkd_fast.models import create_model

    base = folder or Path(tempfile.gettempdir()) / f"dfkd_fast_ablation_{os.getuid()}"
    kept, note = base / _digest(profile) / "teacher.safetensors", base / _digest(profile) / "accuracy.json"
    if not note.exists():
        images = data.load(profile.data)
        model = create_model(profile.teacher, num_classes=images.num_classes)
        config = replace(profile.teach, device=device, out=str(kept.parent))
        result = teach(model, images, config, progress=False)
        if result.weights != kept:
            result.weights.replace(kept)
        note.write_text(json.dumps(result.accuracy))
    return kept, json.loads(note.read_text())


def run_cell(
    profile: Profile, cell: str, seed: int, device: str, teacher: Path, teacher_accuracy: float
) -> dict[str, Any]:
    """Distil one cell with one seed; its row. After a non-finite loss, accuracy is None and ``error`` says why."""
    from dfkd_fast import data
    from dfkd_fast.engine import NonFiniteError, distill
    from dfkd_fast.models import create_model

    images = data.load(profile.data)
    overrides = CELLS[cell]
    torch.manual_seed(seed)
    frozen = create_model(replace(profile.teacher, weights=str(teacher)), num_classes=images.num_classes)
    student = create_model(profile.student, num_classes=images.num_classes)
    loop = profile.distill.loop
    row: dict[str, Any] = {
        "cell": cell,
        "seed": seed,
        "overrides": dict(overrides),
        "accuracy": None,
        "agreement": None,
        "teacher_accuracy": teacher_accuracy,
        "rounds": loop.epochs * loop.rounds_per_epoch,
        "images_per_s": None,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dfkd_fast_cell_") as folder:
        config = override(replace(profile.distill, seed=seed, device=device, out=folder), overrides)
        try:
            result = distill(frozen, student, config, data=images, progress=False)
        except NonFiniteError as error:
            row["error"] = str(error)
        else:
            row |= {
                "accuracy": result.accuracy,
                "agreement": result.agreement,
                "images_per_s": round(result.images_per_s, 1),
            }
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _start_worker() -> None:
    """Use one thread, and end with the parent process: a job that is killed leaves nothing on the device."""
    torch.set_num_threads(1)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux's prctl
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def run_cells(
    profile: Profile, keys: Sequence[tuple[str, int]], results: Results, *, device: str, jobs: int, seconds: float
) -> None:
    """Run cells, ``jobs`` at a time. None is started after so many seconds."""
    from dfkd_fast import data

    start = time.monotonic()
    data.load(profile.data)  # drawn and cached before several processes need it
    teacher, accuracy = trained_teacher(profile, device)
    print(f"teacher: {profile.teacher.name}, top-1 {accuracy:.1%}", flush=True)
    waiting = list(keys)
    running: set[futures.Future[dict[str, Any]]] = set()
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        while waiting or running:
            while waiting and len(running) < jobs and time.monotonic() - start < seconds:
                cell, seed = waiting.pop(0)
                running.add(pool.submit(run_cell, profile, cell, seed, device, teacher, accuracy))
            if not running:
                return
            done, running = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                row = future.result()
                results.add(row)
                top1 = "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
                print(f"{row['cell']}, seed {row['seed']}: {top1} ({row['seconds']:.0f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that have no row yet."""
    command = parser(__doc__, small="smaller networks and images", sizes=tuple(PROFILES))
    command.add_argument("--seconds", type=float, default=math.inf, help="start no cell after this")
    command.add_argument("--jobs", type=int, default=None, help="processes (default: the cores, on a GPU at most 6)")
    command.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options = command.parse_args(arguments)

    results = Results(options.out, key=("cell", "seed"))
    known = {results.key_of(row) for row in results.rows}
    keys = [(cell, seed) for seed in options.seeds for cell in options.cells if (cell, seed) not in known]
    jobs = options.jobs or min(os.cpu_count() or 1, 6 if options.device == "cuda" else 64)
    if keys:
        profile = PROFILES[options.size]
        run_cells(profile, keys, results, device=options.device, jobs=jobs, seconds=options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
