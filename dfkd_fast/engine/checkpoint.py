"""Checkpoints of a run. They are written atomically, and read only if they are undamaged and belong to the run.

A checkpoint is a torch file of tensors, plain values and containers, so ``weights_only=True`` reads it without
executing code. Damage is detected by the checksums of its zip archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfkd_fast.config import DistillConfig, TeachConfig, to_dict
from dfkd_fast.files import atomic_write, zip_damage

__all__ = ["CheckpointError", "Checkpoints", "fingerprint"]

FORMAT = "dfkd_fast.checkpoint/2"
# Fields that are not part of the fingerprint.
_FREE = (
    *((name,) for name in ("out", "resume", "device", "engine", "autotune", "checkpoint_every", "trackers")),
    *(("loop", name) for name in ("checkpoint_every", "keep_checkpoints")),
)
# Fields that can change between a run and its resumption, because they do not change the algorithm.
_CHANGEABLE = {".".join(path) for path in _FREE} | {"channels_last", "evaluate_every", "loop.evaluate_every"}
_KEPT = 2  # checkpoints of supervised training, in case the newest is damaged

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message gives the reason."""


class _OtherRunError(CheckpointError):
    """A checkpoint belongs to another run, so the previous checkpoints do too."""


def fingerprint(config: DistillConfig | TeachConfig) -> str:
    """Hash the fields of a config that determine the final weights of a run.

    Checkpoints of earlier versions contain only this hash, not the settings.
    """
    values = to_dict(config)
    for *path, last in _FREE:
        owner = values
        for key in path:
            owner = owner.get(key, {})
        owner.pop(last, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: the checkpoint folder; the first save creates it.
        config: the run's config. Checkpoints of a config that differs in the algorithm are refused.
        teacher: digest of the teacher's weights. Checkpoints of another teacher are refused. Supervised training has no
            teacher.
        resolved: values of fields that the config leaves open, such as ``image_size`` and ``precision``.
    """

    def __init__(
        self,
        folder: Path,
        config: DistillConfig | TeachConfig,
        teacher: str = "",
        resolved: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.config = folder, config
        self.unit, self.keep = "epoch", _KEPT
        if isinstance(config, DistillConfig):
            self.unit, self.keep = "round", config.loop.keep_checkpoints
        self.identity = {"config": fingerprint(config), "teacher": teacher}
        self.settings = json.loads(json.dumps({**to_dict(config), **(resolved or {})}))

    def paths(self) -> list[Path]:
        """The checkpoint files, newest first."""
        found = self.folder.glob("*-step-*.pt")
        return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state dict atomically, flush it to disk and delete the oldest checkpoints.

        Raises:
            dfkd_fast.files.WriteError: the checkpoint could not be written. The older ones are kept.
        """
        number, step = state["position"]
        path = self.folder / f"{self.unit}-{number:06d}-step-{step:04d}.pt"
        with atomic_write(path) as file:
            torch.save({"format": FORMAT, **self.identity, "settings": self.settings, "state": state}, file)
        self.prune()
        return path

    def prune(self) -> None:
        """Delete the oldest checkpoints. Call it only if the newest one is usable."""
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)

    def read(self, path: Path) -> dict[str, Any]:
        """Read the state dict of one checkpoint.

        Raises:
            CheckpointError: the file is damaged or has another format, or its config or teacher differs.
        """
        if damage := zip_damage(path):
            raise CheckpointError(f"{path.name} is damaged or not a checkpoint: {damage}")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path.name} contains more than tensors and plain values: {error}") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            older = str(found).startswith("dfkd_fast.checkpoint/")
            hint = "; continue this run with the version that started it" if older else ""
            raise CheckpointError(f"{path.name} has format {found}, expected {FORMAT}{hint}")
        try:
            self._check_run(path.name, content)
            return content["state"]
        except CheckpointError:
            raise
        except Exception as error:  # the archive is undamaged, but its content is not that of a checkpoint
            problem = f"its settings or state are invalid: {type(error).__name__}: {error}"
            raise CheckpointError(f"{path.name} is damaged or not a checkpoint: {problem}") from error

    def _check_run(self, name: str, content: dict[str, Any]) -> None:
        """Raise if a checkpoint is of another run, with the settings that differ."""
        remedy = "or choose another folder for out"
        if content.get("teacher") != self.identity["teacher"]:
            raise _OtherRunError(f"{name} was written with another teacher: use the run's first one, {remedy}")
        if "settings" not in content:
            if content.get("config") != self.identity["config"]:
                raise _OtherRunError(f"{name} was written with another config, {remedy}")
            return
        # A field that an earlier version did not have has its default.
        before, now = (
            {**_flat(to_dict(type(self.config)())), **_flat(each)} for each in (content["settings"], self.settings)
        )
        # With select='test_accuracy', the weights are those of the best evaluated epoch.
        fixed = {"loop.evaluate_every"} if now.get("loop.select") == "test_accuracy" else set()
        changeable = _CHANGEABLE - fixed
        changed = [key for key in {**now, **before} if before.get(key) != now.get(key) and key not in changeable]
        position = content["state"]["position"][0]
        if not changed:
            return
        hint = f"set {'it' if len(changed) == 1 else 'them'} back, {remedy}"
        if changed == ["loop.epochs"]:  # of distillation
            constant = now["optimizer.student_schedule"] == "constant"
            if constant and position <= now["loop.epochs"] * now["loop.rounds_per_epoch"]:
                return
            hint = f"this run is already at round {position}; {hint}"
            if not constant:
                hint = (
                    "only a run with optimizer.student_schedule 'constant' can get another length, because the "
                    f"cosine schedule depends on it; {remedy.removeprefix('or ')}"
                )
        listed = "; ".join(
            f"{key} was {before.get(key, 'not set')} and is now {now.get(key, 'not set')}" for key in changed
        )
        raise _OtherRunError(f"{name} was written with another config: {listed}; {hint}")

    def newest(self) -> dict[str, Any] | None:
        """Read the newest usable checkpoint, and warn about unusable ones. Return None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is usable or they belong to another run. The message names
                the settings that differ.
        """
        reasons = []
        for path in self.paths():
            try:
                return self.read(path)
            except _OtherRunError as error:
                raise CheckpointError(f"cannot resume from {self.folder}: {error}") from None
            except CheckpointError as error:
                reasons.append(str(error))
                log.warning("%s; trying the previous checkpoint", error)
        if reasons:
            raise CheckpointError(f"no usable checkpoint in {self.folder}: " + "; ".join(reasons))
        return None

    def resumed(self, networks: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Return the newest usable checkpoint if ``config.resume`` is set, or None for a new run.

        Args:
            networks: the run's networks, by their names in the checkpoint.

        Raises:
            CheckpointError: like :meth:`newest`, or a network has other weights than the checkpoint.
            ValueError: there are checkpoints, but ``config.resume`` is not set.
        """
        if not self.config.resume:
            if self.paths():
                raise ValueError(
                    f"{self.folder.parent} already contains checkpoints of a run: set resume, or choose another folder "
                    "for out"
                )
            return None
        saved = self.newest()
        if saved is None:
            return None
        for name, network in networks.items():
            before, now = (
                {key: tuple(value.shape) for key, value in each.items() if isinstance(value, Tensor)}
                for each in (saved[name], network.state_dict())
            )
            for key in {**before, **now}:
                if before.get(key) != now.get(key):
                    raise CheckpointError(
                        f"cannot resume from {self.folder}: the checkpoint was written with another "
                        f"{name.replace('_', ' ')}: {key} had shape {before.get(key, 'none')} and now has shape "
                        f"{now.get(key, 'none')}; use the network that the run started with"
                    )
        return saved
