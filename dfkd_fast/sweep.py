"""Sweeps: many runs that differ in settings and seeds, in parallel processes, with their results in one SQLite file.

A sweep's folder can be killed at any moment: a later start continues each run from its newest checkpoint, with the same
results bit for bit. Runs of the same data, teacher and training share one teacher.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import resource
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch.utils.data import Subset

from dfkd_fast import data as datasets
from dfkd_fast import report
from dfkd_fast.command_inputs import build_networks, check_data
from dfkd_fast.config import ExperimentConfig, expand, find, read, to_dict
from dfkd_fast.engine import NonFiniteError, Runtime, build_state, create_engine, distill, teach
from dfkd_fast.engine.runtime import new_run_folder
from dfkd_fast.files import lock_folder, write_file
from dfkd_fast.graph import frozen, preserve_train_mode
from dfkd_fast.jobs import Job, JobError, run_jobs
from dfkd_fast.models import create_model, extract, normalization, read_description
from dfkd_fast.profiling import time_steps

__all__ = [
    "Cell",
    "SweepConfig",
    "cell_folder",
    "estimate",
    "mean_and_deviation",
    "paired_difference",
    "read_sweep",
    "run_cell",
    "sweep",
    "sweep_cells",
    "sweep_table",
    "train_teacher",
]

Role = Literal["distill", "teacher", "student"]
_RESERVED = ("configs", "role")  # keys of a level that are not fields


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A sweep: the product of some axes, repeated with several seeds.

    A level of an axis maps dotted fields of :class:`dfkd_fast.config.ExperimentConfig` to values. Two more keys are
    ``configs``, names of further configs, and ``role``: ``distill`` (the default), or ``teacher`` or ``student`` to
    train that network on labeled images.

    Args:
        title: title of the table.
        configs: configs of all cells; each replaces fields of those before.
        changes: fields of all cells, by dotted path.
        axes: the levels of each axis by name. With several axes, the first one becomes the columns of the table.
        seeds: random seeds, which replace ``distill.seed`` and ``teach.seed``.
        published: top-1 accuracy in percent by row of the table: a number, or one per column.
        compare_with: a row of the table. The others get a column with the paired difference to it.
    """

    title: str
    configs: list[str] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, dict[str, dict[str, Any]]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    published: dict[str, Any] = field(default_factory=dict)
    compare_with: str | None = None

    def __post_init__(self) -> None:
        if not self.axes or not all(self.axes.values()) or not self.seeds:
            raise ValueError("SweepConfig.axes and SweepConfig.seeds must not be empty")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError(f"SweepConfig.seeds must be different, got {self.seeds}")
        known = {row for _, row in positions(self).values()}
        if unknown := {*self.published, *([self.compare_with] if self.compare_with else [])} - known:
            raise ValueError(f"not a row of the sweep: {', '.join(sorted(unknown))}; rows: {', '.join(sorted(known))}")
        columns = len({column for column, _ in positions(self).values()})
        for row, values in self.published.items():
            if isinstance(values, list) and len(values) != columns:
                raise ValueError(f"SweepConfig.published[{row!r}] must have {columns} values, got {len(values)}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: the names of its levels, separated by commas.
        seed: its random seed.
        role: what is trained.
        changes: its fields that differ from other cells, by dotted path.
        experiment: its settings, with the seed.
    """

    name: str
    seed: int
    role: Role
    changes: dict[str, Any]
    experiment: ExperimentConfig

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def settings(self) -> str:
        """Return everything that the result depends on except for the seed, as JSON."""
        values: dict[str, Any] = {"role": self.role, **to_dict(self.experiment)}
        values["distill" if self.role == "distill" else "teach"]["seed"] = None
        if (root := values["data"]["root"]) is not None:
            values["data"]["root"] = str(expand(root))
        return json.dumps(values, sort_keys=True)

    def folder(self, root: Path) -> Path:
        """Return the folder of the run."""
        return cell_folder(root, self.name, self.seed)


def cell_folder(root: Path, name: str, seed: int) -> Path:
    """Return the folder of a cell's run in a sweep's folder."""
    plain = "".join(each if each.isalnum() or each in "._-" else "_" for each in name)
    return root / "cells" / plain / f"seed-{seed}"


def read_sweep(name: str) -> SweepConfig:
    """Read a sweep from a file, or a packaged sweep by its name.

    Raises:
        FileNotFoundError: there is no such file or packaged sweep. The message lists the packaged ones.
        ValueError: the file is not a valid sweep. The message names the field.
    """
    return read(SweepConfig, find(name))


def sweep_cells(config: SweepConfig, *, changes: Mapping[str, Any] | None = None) -> list[Cell]:
    """Return the runs of a sweep: the product of its axes per seed, in the order of the seeds.

    Args:
        config: the sweep.
        changes: fields of all cells, by dotted path, which replace those of the sweep.

    Raises:
        FileNotFoundError: a config does not exist.
        ValueError: a field of a cell is unknown or invalid, or a cell lacks data or networks.
    """
    cells = []
    for levels in itertools.product(*(axis.items() for axis in config.axes.values())):
        name, own = ", ".join(name for name, _ in levels), dict[str, Any]()
        configs = [*config.configs, *itertools.chain.from_iterable(level.get("configs", ()) for _, level in levels)]
        if not configs:
            raise ValueError(f"the cell {name!r} has no configs")
        for _, level in levels:
            own |= level
        role: Role = own.get("role", "distill")
        if role not in ("distill", "teacher", "student"):
            raise ValueError(f"the role of {name!r} must be distill, teacher or student, got {role!r}")
        own = {key: value for key, value in own.items() if key not in _RESERVED}
        paths = [find(each) for each in configs]
        try:
            experiment = read(ExperimentConfig, *paths, changes={**config.changes, **own, **(changes or {})})
        except ValueError as error:
            raise ValueError(f"cell {name!r}: {error}") from error
        for part in ("data", "teacher", "student"):
            if getattr(experiment, part) is None:
                raise ValueError(f"cell {name!r} has no {part}")
        if role == "teacher" and _required(experiment.teacher).weights is not None:
            raise ValueError(f"cell {name!r} trains the teacher, but teacher.weights is set")
        cells += [_seeded(name, seed, role, own, experiment) for seed in config.seeds]
    if len({cell.folder(Path()) for cell in cells}) < len(cells):
        raise ValueError("the names of two cells differ only in characters that a folder's name cannot have")
    return sorted(cells, key=lambda cell: config.seeds.index(cell.seed))


def _seeded(name: str, seed: int, role: Role, changes: dict[str, Any], experiment: ExperimentConfig) -> Cell:
    if role == "distill":  # all seeds have the same teacher
        seeded = replace(experiment, distill=replace(experiment.distill, seed=seed))
    else:
        seeded = replace(experiment, teach=replace(experiment.teach, seed=seed))
    return Cell(name=name, seed=seed, role=role, changes=changes, experiment=seeded)


class _Rows:
    """The results of a sweep's cells in ``sweep.db``.

    A row has the cell, its settings, a status (``done``, ``failed``, ``stopped`` or ``waiting``), and the result or the
    error. Only the process that holds the lock of the folder writes.
    """

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "sweep.db", isolation_level=None)
        self.connection.row_factory = sqlite3.Row
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute(
            "CREATE TABLE IF NOT EXISTS cells (cell TEXT, seed INTEGER, settings TEXT, changes TEXT, status TEXT, "
            "result TEXT, error TEXT, seconds REAL, images_per_s REAL, environment TEXT, PRIMARY KEY (cell, seed))"
        )

    def close(self) -> None:
        self.connection.close()

    def add(self, cells: Sequence[Cell]) -> None:
        """Add the cells that have no row yet.

        Raises:
            ValueError: a cell has a row with other settings, of the same or of another seed.
        """
        known = {row["cell"]: row["settings"] for row in self.connection.execute("SELECT cell, settings FROM cells")}
        rows = [(cell.name, cell.seed, cell.settings(), json.dumps(cell.changes), "waiting") for cell in cells]
        for name, _, settings, *_ in rows:
            if known.get(name, settings) != settings:
                raise ValueError(
                    f"the settings of {name!r} differ from those in this folder: choose another folder for --out"
                )
        self.connection.execute("BEGIN IMMEDIATE")
        self.connection.executemany(
            "INSERT OR IGNORE INTO cells (cell, seed, settings, changes, status) VALUES (?, ?, ?, ?, ?)", rows
        )
        self.connection.execute("COMMIT")

    def set(self, cell: Cell, status: str, **values: Any) -> None:
        """Change columns of a row."""
        columns = {"status": status, "error": None, **values}
        assigned = ", ".join(f"{name} = ?" for name in columns)
        self.connection.execute(
            f"UPDATE cells SET {assigned} WHERE cell = ? AND seed = ?", (*columns.values(), cell.name, cell.seed)
        )

    def read(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Return the rows of cells, with their results as further columns."""
        rows = []
        every = {(row["cell"], row["seed"]): row for row in self.connection.execute("SELECT * FROM cells")}
        for row in (every[cell.name, cell.seed] for cell in cells):
            values = {name: row[name] for name in ("cell", "seed", "status", "error", "seconds", "images_per_s")}
            values |= {"overrides": json.loads(row["changes"]), **json.loads(row["result"] or "{}")}
            rows.append({**values, "environment": json.loads(row["environment"] or "null")})
        return rows


def export(folder: Path, config: SweepConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows to ``results.json`` and ``results.csv`` of a sweep's folder, and return them."""
    environments: list[dict[str, Any]] = []
    for row in rows:
        if row["environment"] is None:
            continue
        if row["environment"] not in environments:
            environments.append(row["environment"])
        row["environment"] = environments.index(row["environment"])
    content = {"sweep": to_dict(config), "environments": environments, "rows": rows}
    report.write_results(folder / "results.json", content)
    flat = [{**row, "overrides": json.dumps(row["overrides"])} for row in rows]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    writer.writerows(flat)
    write_file(folder / "results.csv", text.getvalue().encode())
    return rows


def train_teacher(
    experiment: ExperimentConfig, out: Path, *, role: Literal["teacher", "student"] = "teacher", progress: Any = False
) -> dict[str, Any]:
    """Train a network on labeled images, or continue this after an interruption, and return its row.

    The row has ``accuracy``, ``images_per_s``, ``seconds`` and ``weights``, the path of the weights.
    """
    start, images = time.perf_counter(), datasets.load(_required(experiment.data))
    model = _required(getattr(experiment, role))
    torch.manual_seed(experiment.teach.seed)  # determines the initial weights
    network = create_model(model, num_classes=images.num_classes, new_head=True)
    settings = replace(experiment.teach, out=str(out), resume=True)
    workers = _required(experiment.data).workers
    result = teach(network, images, settings, description=model.metadata(), workers=workers, progress=progress)
    seconds = round(time.perf_counter() - start, 1)
    row = {"accuracy": result.accuracy, "images_per_s": result.images_per_s, "seconds": seconds}
    return {**row, "weights": str(result.weights)}


def _required(value: Any) -> Any:
    assert value is not None  # sweep_cells has checked it
    return value


def run_cell(
    cell: Cell, folder: Path, teacher: Mapping[str, Any] | None = None, *, progress: Any = False
) -> dict[str, Any]:
    """Run a cell, or continue it after an interruption, and return its row.

    Args:
        cell: the cell.
        folder: the sweep's folder.
        teacher: the result of :func:`train_teacher`; None uses the weights in the cell's settings.
        progress: called with the progress.

    Returns:
        ``accuracy``, ``images_per_s`` and ``seconds``, both of the last process; after a distillation also
        ``agreement``, ``teacher_accuracy`` and ``rounds``. If a loss was not finite, ``accuracy`` is None and
        ``reason`` has the message.
    """
    experiment, out, start = cell.experiment, cell.folder(folder), time.perf_counter()
    if cell.role != "distill":
        try:
            trained = train_teacher(experiment, out, role="student", progress=progress) if teacher is None else teacher
        except ArithmeticError as error:
            return {"accuracy": None, "images_per_s": None, "seconds": None, "reason": str(error)}
        return {name: trained[name] for name in ("accuracy", "images_per_s", "seconds")}
    images = datasets.load(_required(experiment.data))
    if teacher is not None:
        experiment = replace(experiment, teacher=replace(_required(experiment.teacher), weights=teacher["weights"]))
    weights = _required(experiment.teacher).weights
    check_data(weights, read_description(weights), images)
    networks = build_networks(experiment, images.num_classes, images.image_size)
    loop = experiment.distill.loop
    row: dict[str, Any] = {"accuracy": None, "agreement": None, "images_per_s": None}
    row |= {"teacher_accuracy": teacher and teacher["accuracy"], "rounds": loop.epochs * loop.rounds_per_epoch}
    inputs = {name: to_dict(getattr(experiment, name)) for name in ("data", "teacher", "student")}
    try:
        result = distill(
            *networks,
            replace(experiment.distill, out=str(out), resume=True),
            data=images,
            description=_required(experiment.student).metadata(),
            inputs=inputs,
            progress=progress,
        )
        row |= {"accuracy": result.accuracy, "agreement": result.agreement, "images_per_s": result.images_per_s}
    except NonFiniteError as error:
        row["reason"] = str(error)
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _teacher_name(cell: Cell) -> str | None:
    """The name of the job that trains a cell's teacher, which identifies the teacher."""
    experiment = cell.experiment
    if cell.role == "student" or (cell.role == "distill" and _required(experiment.teacher).weights is not None):
        return None
    parts = [to_dict(each) for each in (experiment.data, experiment.teacher, experiment.teach)]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
    return f"teacher {_required(experiment.teacher).name}, {_required(experiment.data).name}, {digest}"


@dataclass(frozen=True)
class _Call:
    """A cell in another process. Its result has the cell, so that it can be recorded as soon as it arrives."""

    cell: Cell
    folder: Path

    def __call__(self, *teacher: Mapping[str, Any], progress: Any) -> tuple[Cell, dict[str, Any]]:
        return self.cell, run_cell(self.cell, self.folder, *teacher, progress=progress)


def _text(result: Any) -> str:
    row = result[1] if isinstance(result, tuple) else result
    return "not finite" if row["accuracy"] is None else f"{row['accuracy']:.1%}"


def _workers(jobs: int | None) -> int | None:
    return jobs if jobs is not None else torch.cuda.device_count() or None


def sweep(
    config: SweepConfig,
    out: str | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    minutes_per_cell: float = math.inf,
    minutes: float = math.inf,
    console: Console | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Run the cells of a sweep that are not done, in parallel processes, and print a table.

    Writes ``sweep.db``, ``results.json``, ``results.csv``, and the folders of the runs. If a run fails, its traceback
    is in ``error.txt`` of its folder, the others continue, and the next start tries it again. A script that calls this
    needs ``if __name__ == "__main__":``, because the processes import it.

    Args:
        config: the sweep.
        out: folder of the sweep. If it contains results, the sweep continues. None creates a new one under ``runs/``.
        changes: fields of all cells, by dotted path.
        jobs: number of processes at a time; None is one per GPU, or without GPUs one per core.
        minutes_per_cell: minutes after which a cell is stopped with a checkpoint. The next start continues it.
        minutes: minutes after which the whole sweep is stopped like this.
        console: console of the output.

    Returns:
        The folder and the rows of all cells: ``cell``, ``seed``, ``status`` (``done``, ``failed``, ``stopped`` or
        ``waiting``), ``error``, ``overrides`` and the values of :func:`run_cell`.

    Raises:
        ValueError: the folder contains results of other settings.
        dfkd_fast.files.FolderInUseError: another sweep uses the folder.
    """
    console = console or Console()
    cells = sweep_cells(config, changes=changes)
    folder = new_run_folder(out, "sweep")
    with lock_folder(folder), closing(_Rows(folder)) as rows:
        rows.add(cells)
        status = {(row["cell"], row["seed"]): row["status"] for row in rows.read(cells)}
        left = {str(cell): cell for cell in cells if status[cell.name, cell.seed] != "done"}
        for cell in (cell for cell in cells if str(cell) not in left):  # the process may have died before it did this
            shutil.rmtree(cell.folder(folder) / "checkpoints", ignore_errors=True)
        teachers = {name: cell for cell in left.values() if (name := _teacher_name(cell)) is not None}
        todo = [
            Job(name=name, call=partial(train_teacher, cell.experiment, folder / "teachers" / name.split()[-1]))
            for name, cell in teachers.items()
        ]
        for name, cell in left.items():
            teacher = _teacher_name(cell)
            todo.append(Job(name=name, call=_Call(cell, folder), after=(teacher,) if teacher else ()))
        environment = json.dumps({**report.environment(), "date": None, "threads": 1})  # of a job

        def exported() -> list[dict[str, Any]]:
            return export(folder, config, rows.read(cells))

        def finished(result: Any) -> None:
            if not isinstance(result, tuple):
                return
            cell, row = result
            measured = {name: row.pop(name) for name in ("seconds", "images_per_s")}
            rows.set(cell, "done", result=json.dumps(row), environment=environment, **measured)
            exported()
            shutil.rmtree(cell.folder(folder) / "checkpoints", ignore_errors=True)
            (cell.folder(folder) / "error.txt").unlink(missing_ok=True)  # of an earlier start

        def failed(name: str, error: JobError) -> None:
            if name in left:
                rows.set(left[name], "stopped" if error.stopped else "failed", error=str(error))
                exported()
                if error.details:
                    write_file(left[name].folder(folder) / "error.txt", error.details.encode())

        limits = {"limit_s": 60 * minutes_per_cell, "budget_s": 60 * minutes}
        exported()  # so that a page can show the sweep while it runs, also if it is killed
        run_jobs(todo, workers=_workers(jobs), text=_text, finished=finished, failed=failed, console=console, **limits)
        found = exported()
    console.print(report.result_table(sweep_table(config, found), config.title))
    if missing := sum(row["status"] != "done" for row in found):
        console.print(f"{missing} of {len(found)} runs are missing; start the sweep again with --out {folder}")
    return folder, found


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return mean and standard deviation of shares, in percent."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):.1%}" + (f" ± {100 * statistics.stdev(values):.1f}" if values[1:] else "")


def paired_difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean difference of pairs, the half width of its 95 % interval, and the p-value of a paired t-test.

    With one pair, the width and the p-value are NaN.
    """
    from scipy.stats import t

    differences = [one - other for one, other in zip(values, base, strict=True)]
    mean, freedom = statistics.fmean(differences), len(differences) - 1
    if not freedom:
        return mean, math.nan, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    width = float(t.ppf(0.975, freedom)) * error
    return mean, width, float(2 * t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)


def positions(config: SweepConfig) -> dict[str, tuple[str, str]]:
    """Return the column and the row in the table of each cell. The first of several axes is that of the columns."""
    split = len(config.axes) > 1
    products = itertools.product(*config.axes.values())
    return {", ".join(levels): (levels[0] if split else "", ", ".join(levels[split:])) for levels in products}


def accuracies(config: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """Return the accuracies of each cell by seed, without runs that are missing or whose loss was not finite."""
    found: dict[str, dict[int, float]] = {name: {} for name in positions(config)}
    for row in rows:
        if row["cell"] in found and row["seed"] in config.seeds and row.get("accuracy") is not None:
            found[row["cell"]][row["seed"]] = row["accuracy"]
    return found


def sweep_table(config: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the table of a sweep: top-1 per row and column, next to the published values in brackets.

    ``n`` is the number of finished runs per row; those that are missing or whose loss was not finite are listed.
    """
    where, by_cell = positions(config), accuracies(config, rows)
    columns = list(dict.fromkeys(column for column, _ in where.values()))
    not_finite = Counter(
        row["cell"]
        for row in rows
        if row["seed"] in config.seeds and row["status"] == "done" and row.get("accuracy") is None
    )
    table: dict[str, dict[str, str]] = {}
    for name, (column, row_name) in where.items():
        line = table.setdefault(row_name, {list(config.axes)[-1]: row_name})
        values, published = by_cell[name], config.published.get(row_name)
        text = mean_and_deviation([*values.values()])
        if published is not None:
            line_value = published[columns.index(column)] if isinstance(published, list) else published
            text += f" ({line_value})"
        line[column or "top-1"] = text
        if config.compare_with is not None:
            line[f"{column} difference".strip()] = ""
        if config.compare_with not in (None, row_name):
            base = by_cell[next(n for n, at in where.items() if at == (column, config.compare_with))]
            if seeds := [seed for seed in values if seed in base]:
                mean, width, p = paired_difference([values[s] for s in seeds], [base[s] for s in seeds])
                text = (
                    f"{100 * mean:+.1f}"
                    if math.isnan(width)
                    else f"{100 * mean:+.1f} ± {100 * width:.1f} (p = {p:.2g})"
                )
                line[f"{column} difference".strip()] = text
    for row_name, line in table.items():
        cells = [name for name, at in where.items() if at[1] == row_name]
        done, broken = sum(len(by_cell[name]) for name in cells), sum(not_finite[name] for name in cells)
        line["n"] = f"{done} of {len(cells) * len(config.seeds)}" + (f", not finite: {broken}" if broken else "")
    return list(table.values())


def probe(experiment: ExperimentConfig, *, progress: Any = False) -> dict[str, float]:
    """Estimate the time and memory of a distillation from a few steps with random weights.

    Returns:
        ``seconds`` without compilation and evaluations, and ``bytes``: on a GPU the peak of allocated memory, otherwise
        that of the process.
    """
    config, data = experiment.distill, _required(experiment.data)
    classes, size = datasets.num_classes(data) or 200, config.image_size or data.image_size
    models = (
        replace(_required(each), weights=None, pretrained=False) for each in (experiment.teacher, experiment.student)
    )
    networks = [
        extract(create_model(each, num_classes=classes), stages=each.stages, image_size=size) for each in models
    ]
    runtime, loop = Runtime.of(config.device, config.precision, channels_last=config.channels_last), config.loop
    mean, std = normalization(networks[0].model)
    networks[1].train()
    with runtime.backends(), frozen(networks[0]), preserve_train_mode(networks[0], False):
        sized = replace(config, image_size=size)
        engine = create_engine(
            build_state(networks[0], networks[1], sized, runtime, image_size=size, mean=mean, std=std)
        )
        engine.prepare()
        microseconds = []
        for start, count in ((0, loop.generator_steps), (loop.generator_steps, loop.student_steps)):
            few = min(2, count)
            # The last steps too: DeepInversion's first ones are at a lower resolution.
            places = [start, start + count - few] if count else []
            for first in places:
                time_steps(engine, first, few)  # warms up
            microseconds.append(sum(time_steps(engine, first, few) for first in places) / 2)
    rounds = loop.epochs * loop.rounds_per_epoch
    total = rounds * (loop.generator_steps * microseconds[0] + loop.student_steps * microseconds[1]) / 1e6
    return {"seconds": total, "bytes": _peak(runtime)}


def _probe_training(experiment: ExperimentConfig, role: Role, *, progress: Any = False) -> dict[str, float]:
    """Like :func:`probe`, of the supervised training of a network: from four steps, which also load their images."""
    images, config = datasets.load(_required(experiment.data)), experiment.teach
    train: Any = images.train
    few = replace(
        images,
        train=Subset(train, range(min(len(train), 4 * config.batch_size))),
        test=Subset(images.test, range(1)),
    )
    model = replace(_required(getattr(experiment, role)), weights=None, pretrained=False)
    network = create_model(model, num_classes=images.num_classes)
    with tempfile.TemporaryDirectory() as folder:
        short = replace(config, epochs=1, warmup_epochs=0, trackers=[], out=folder)
        workers = _required(experiment.data).workers
        speed = teach(network, few, short, workers=workers, progress=False).images_per_s
    runtime = Runtime.of(config.device, config.precision, channels_last=config.channels_last)
    return {"seconds": config.epochs * len(train) / speed, "bytes": _peak(runtime)}


def _peak(runtime: Runtime) -> float:
    """The most bytes that this process has allocated on its GPU, or without a GPU in memory."""
    if runtime.device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def estimate(
    config: SweepConfig,
    *,
    changes: Mapping[str, Any] | None = None,
    jobs: int | None = None,
    console: Console | None = None,
) -> list[dict[str, str]]:
    """Print the runs of a sweep, with the time and memory of each from a short probe, and run nothing else.

    A probe takes a few steps: those of distillations with random weights and noise, those of supervised trainings with
    images of the data set. Returns the rows of the table.
    """
    console, cells = console or Console(), sweep_cells(config, changes=changes)
    trains: dict[str, tuple[Role, int, Job]] = {}
    for name, cell in {cell.name: cell for cell in reversed(cells)}.items():
        distills = cell.role == "distill"
        call = partial(probe, cell.experiment) if distills else partial(_probe_training, cell.experiment, cell.role)
        trains[name] = cell.role, len(config.seeds), Job(name=name, call=call)
    of_cells = {_teacher_name(cell) for cell in cells if cell.role == "teacher"}
    for cell in cells:
        teacher = _teacher_name(cell)
        if teacher is not None and teacher not in of_cells:
            call = partial(_probe_training, cell.experiment, "teacher")
            trains[teacher] = "teacher", 1, Job(name=teacher, call=call)
    errors: dict[str, str] = {}
    found = run_jobs(
        [job for *_, job in trains.values()],
        workers=_workers(jobs),
        text=lambda row: f"{row['seconds'] / 3600:.2f} h",
        failed=lambda name, error: errors.update({name: str(error)}),
        console=console,
    )
    rows = []
    for name, (role, runs, _) in trains.items():
        row = {"cell": name, "runs": str(runs), "trains": role}
        if name in found:
            row |= {
                "hours per run": f"{found[name]['seconds'] / 3600:.2f}",
                "GiB": f"{found[name]['bytes'] / 2**30:.1f}",
            }
        rows.append({**row, **({"error": errors[name]} if name in errors else {})})
    console.print(report.result_table(rows, f"{config.title}: {len(cells)} runs"))
    hours = sum(runs * found[name]["seconds"] for name, (_, runs, _) in trains.items() if name in found) / 3600
    console.print(f"about {hours:.1f} h of one process, without evaluations and compilation")
    return rows
