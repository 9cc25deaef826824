"""Trackers, which record the losses, pictures and results of a run: TensorBoard, JSON lines, wandb and MLflow."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from dfkd_fast.files import WriteError, write_file
from dfkd_fast.graph.tracing import first_line
from dfkd_fast.registry import Registry

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "TrackerError", "Trackers"]

log = logging.getLogger(__name__)

_FLUSH_S = 30.0  # for a TensorBoard that watches the run
_UPLOAD_S = 600.0  # after it, `wandb sync` can upload the rest
_PROJECT = "dfkd-fast"


class TrackerError(RuntimeError):
    """A tracker cannot start: its package is missing, or its service refuses the run."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a tracker records.

    Attributes:
        folder: the run's folder.
        config: the content of its ``config.yaml``.
        resumed: whether an earlier process may have recorded a part of the same run.
        steps: number of steps (rounds of ``distill``, epochs of ``teach``) that are not repeated.
        epochs: number of epochs of ``distill`` whose evaluations are not repeated.
    """

    folder: Path
    config: Mapping[str, Any]
    resumed: bool = False
    steps: int = 0
    epochs: int = 0


class Tracker:
    """Records one run. A subclass that is registered in :data:`TRACKERS` can be named in ``trackers`` of a config.

    An exception of a method ends the tracker with a warning, and the run continues. Calls come from more than one
    thread, but never at the same time.

    Args:
        run: the run. An exception of the constructor ends the run.
    """

    hint = ""  # what to do if the constructor fails

    def __init__(self, run: TrackedRun) -> None:
        self.run, self.path = run, run.folder

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record values of a step. Steps count from one.

        Args:
            values: by name. Names with the prefix ``epoch/`` are of the epoch ``step``; for all others, ``step`` is a
                round of ``distill`` or an epoch of ``teach``.
            step: the number.
        """
        raise NotImplementedError

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        """Record images of an epoch: float32 (N, 3, H, W) in [0, 1], on any device."""

    def add_results(self, results: Mapping[str, float]) -> None:
        """Record the final results of the run, once."""

    def flush(self) -> None:
        """Write everything out, so that it is not lost if the process is killed."""

    def close(self, *, failed: bool) -> None:
        """End the record of this process. ``failed``: the run was interrupted, or raised an exception."""


TRACKERS: Registry[Callable[[TrackedRun], Tracker]] = Registry("tracker", "trackers")


class Trackers:
    """The trackers of a run, which the end of a ``with`` block closes. One that fails is removed with a warning.

    Raises:
        ValueError: a name is unknown.
        TrackerError: a tracker cannot start.
    """

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        self._lock = threading.Lock()  # pictures are written by another thread
        self._trackers = {name: self._start(name, run) for name in names}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    @staticmethod
    def _start(name: str, run: TrackedRun) -> Tracker:
        factory = TRACKERS.find(name)
        try:
            return factory(run)
        except TrackerError:
            raise
        except Exception as error:  # each service has its own exceptions
            reason = "; ".join(filter(None, (first_line(error), getattr(factory, "hint", ""))))
            raise TrackerError(f"the tracker {name!r} cannot start: {reason}") from error

    def _call(self, method: str, *arguments: Any, **options: Any) -> None:
        with self._lock:
            for name, tracker in list(self._trackers.items()):
                try:
                    getattr(tracker, method)(*arguments, **options)
                except Exception as error:
                    del self._trackers[name]
                    of_a_file = isinstance(error, OSError) and error.errno is not None
                    reason = WriteError.of(tracker.path, error) if of_a_file else first_line(error)  # type: ignore[arg-type]
                    log.warning("%s; the rest of the run is not recorded by the tracker %r", reason, name)

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._call("add_scalars", values, step)

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        self._call("add_images", name, images, step)

    def add_results(self, results: Mapping[str, float]) -> None:
        self._call("add_results", results)

    def flush(self) -> None:
        self._call("flush")

    def close(self, *, failed: bool) -> None:
        self._call("close", failed=failed)


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Event files in the folder ``tensorboard``, of which the first write creates one.

    Writes in the calling thread, unlike torch's SummaryWriter, whose thread can wait forever if memory runs out.
    TensorBoard hides the steps of earlier processes that this process repeats.
    """

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self.path, self._flushed = run.folder / "tensorboard", 0.0
        self._writer: RecordWriter | None = None

    def _write(self, **event: Any) -> None:
        if self._writer is None:
            self.path.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._writer = RecordWriter((self.path / name).open("wb"))
            self._write(file_version="brain.Event:2")
            # TensorBoard ignores the first process's value, but without it, it also ignores the second one's.
            self._write(session_log=SessionLog(status=SessionLog.START), step=self.run.steps + 1)
            self._write(summary=self._text("config", self.run.config), step=self.run.steps + 1)
        self._writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        if time.monotonic() - self._flushed > _FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    @staticmethod
    def _text(name: str, values: Mapping[str, Any]) -> Any:
        lines = yaml.safe_dump(dict(values), sort_keys=False).splitlines()
        return summary.text(name, "\n".join(f"    {line}" for line in lines))  # Markdown for code

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._write(summary=summary.scalar(name, value), step=step)

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        self._write(summary=summary.image(name, images, dataformats="NCHW"), step=step)
        self.flush()

    def add_results(self, results: Mapping[str, float]) -> None:
        if self._writer is not None:  # a finished run that is resumed writes nothing
            self._write(summary=self._text("results", results), step=self.run.steps + 1)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


@TRACKERS.register("jsonl")
class JsonLines(Tracker):
    """``log.jsonl``: one line for the config, one per step and evaluation, and one for the results.

    A resumed run first removes the lines that it will write again.
    """

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self.path = run.folder / "log.jsonl"
        self._file: TextIO | None = None

    def _is_kept(self, line: str) -> bool:
        try:
            record = json.loads(line)
        except ValueError:  # a process was killed while it wrote the line
            return False
        limit = self.run.epochs if any(name.startswith("epoch/") for name in record) else self.run.steps
        return record.get("step", math.inf) <= limit

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is None:
            lines = self.path.read_text().splitlines() if self.run.resumed and self.path.exists() else []
            lines = [json.dumps({"config": self.run.config}), *filter(self._is_kept, lines)]
            write_file(self.path, "".join(f"{line}\n" for line in lines).encode())
            self._file = self.path.open("a")
        self._file.write(f"{json.dumps(record)}\n")
        self._file.flush()

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._write({"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}})

    def add_results(self, results: Mapping[str, float]) -> None:
        self._write({"results": dict(results)})

    def close(self, *, failed: bool) -> None:
        if self._file is not None:
            self._file.close()


class _Service(Tracker):
    """A tracker whose package is an extra of the same name.

    The run's id in the service is stored in the run's folder, so that a resumed run continues it. Steps that are
    repeated are recorded twice, with equal values.
    """

    package: str

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        try:
            self.module: Any = importlib.import_module(self.package)
        except ImportError as error:
            raise TrackerError(
                f"the tracker {self.package!r} needs the package {error.name or self.package}: "
                f"pip install 'dfkd-fast[{self.package}]'"
            ) from error
        self._id_file = run.folder / f"{self.package}_run.txt"

    def stored_id(self) -> str | None:
        return self._id_file.read_text().strip() if self.run.resumed and self._id_file.exists() else None

    def store_id(self, name: str) -> None:
        write_file(self._id_file, f"{name}\n".encode())


def _grid(images: Tensor) -> Any:
    """Images (N, 3, H, W) in [0, 1] as one uint8 NumPy array (H, W, 3)."""
    from torchvision.utils import make_grid

    pixels = make_grid(images.float().cpu().nan_to_num().clamp(0, 1), nrow=8)
    return (pixels * 255).round().byte().permute(1, 2, 0).numpy()


@TRACKERS.register("wandb")
class Wandb(_Service):
    """A run of Weights & Biases, in the project ``dfkd-fast`` or ``WANDB_PROJECT``. Its x axis is ``step``."""

    package, hint = "wandb", "log in with `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=run.folder.name,
            dir=str(run.folder),
            id=self.stored_id(),
            resume="allow",
            config=dict(run.config),
            reinit="create_new",  # independent of a run of the calling program
            settings=self.module.Settings(console="off", silent=True, finish_timeout=_UPLOAD_S),
        )
        self.store_id(self._run.id)
        self._run.define_metric("*", step_metric="step")  # its own counter refuses epochs after rounds

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        self._run.log({name: self.module.Image(_grid(images)), "step": step})

    def add_results(self, results: Mapping[str, float]) -> None:
        self._run.summary.update({f"results/{name}": value for name, value in results.items()})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


@TRACKERS.register("mlflow")
class MLflow(_Service):
    """A run of MLflow at ``MLFLOW_TRACKING_URI``, in the experiment ``dfkd-fast`` or ``MLFLOW_EXPERIMENT_NAME``."""

    package, hint = "mlflow", "set MLFLOW_TRACKING_URI to the address of a server"

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self._client = self.module.MlflowClient()
        stored = self.stored_id()
        if stored is not None:
            self._id = stored
            self._client.update_run(stored, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(number, run_name=run.folder.name).info.run_id
        self.store_id(self._id)
        self._client.log_dict(self._id, dict(run.config), "config.yaml")

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        metric, now = self.module.entities.Metric, int(time.time() * 1000)
        self._client.log_batch(self._id, [metric(name, value, now, step) for name, value in values.items()])

    def add_images(self, name: str, images: Tensor, step: int) -> None:
        self._client.log_image(self._id, _grid(images), key=name, step=step)

    def add_results(self, results: Mapping[str, float]) -> None:
        self.add_scalars({f"results/{name}": value for name, value in results.items()}, self.run.steps)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
