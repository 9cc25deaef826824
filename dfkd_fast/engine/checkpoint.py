"""Checkpoints of a run. They are written atomically, and read only if they are undamaged and belong to the run.

A checkpoint is a torch file of tensors, plain values and containers, so ``weights_only=True`` reads it without
executing code. Damage is detected by the checksums of its zip archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from dfkd_fast.config import DistillConfig, to_dict

__all__ = ["CheckpointError", "Checkpoints", "fingerprint"]

FORMAT = "dfkd_fast.checkpoint/2"
# Fields that can change between a run and its resumption without changing the final weights.
_FREE = (
    *((name,) for name in ("out", "resume", "device", "engine", "autotune")),
    *(("loop", name) for name in ("checkpoint_every", "keep_checkpoints")),
)

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message gives the reason."""


def fingerprint(config: DistillConfig) -> str:
    """Hash the fields of a config that determine the final weights of a run."""
    values = to_dict(config)
    for *path, last in _FREE:
        owner = values
        for key in path:
            owner = owner[key]
        del owner[last]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: the checkpoint folder; the first save creates it.
        config: the run's config. Checkpoints of another config are refused.
        teacher: digest of the teacher's weights. Checkpoints of another teacher are refused.
    """

    def __init__(self, folder: Path, config: DistillConfig, teacher: str) -> None:
        self.folder = folder
        self.keep = config.loop.keep_checkpoints
        self.identity = {"config": fingerprint(config), "teacher": teacher}

    def paths(self) -> list[Path]:
        """The checkpoint files, newest first."""
        found = self.folder.glob("round-*-step-*.pt")
        return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)], reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state dict atomically, flush it to disk and delete the oldest checkpoints."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number, step = state["position"]
        path = self.folder / f"round-{number:06d}-step-{step:04d}.pt"
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **self.identity, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        for old in self.paths()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def read(self, path: Path) -> dict[str, Any]:
        """Read the state dict of one checkpoint.

        Raises:
            CheckpointError: the file is damaged or has another format, or its config or teacher differs.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except Exception as error:  # damaged headers raise many exception types
            raise CheckpointError(f"{path.name} is damaged or not a checkpoint: {error}") from error
        if broken is not None:
            raise CheckpointError(f"{path.name} is damaged: the checksum of its record {broken} does not match")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path.name} contains more than tensors and plain values: {error}") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            older = str(found).startswith("dfkd_fast.checkpoint/")
            hint = "; continue this run with the version that started it" if older else ""
            raise CheckpointError(f"{path.name} has format {found}, expected {FORMAT}{hint}")
        for name, expected in self.identity.items():
            if content.get(name) != expected:
                raise CheckpointError(f"{path.name} was written with another {name}")
        return content["state"]

    def newest(self) -> dict[str, Any] | None:
        """Read the newest usable checkpoint, and warn about unusable ones. Return None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none is usable.
        """
        reasons = []
        for path in self.paths():
            try:
                return self.read(path)
            except CheckpointError as error:
                reasons.append(str(error))
                log.warning("%s; trying the previous checkpoint", error)
        if reasons:
            raise CheckpointError(f"no usable checkpoint in {self.folder}: " + "; ".join(reasons))
        return None
