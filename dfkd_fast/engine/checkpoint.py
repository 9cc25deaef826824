"""Checkpoints of a run: written atomically, read only if they are sound and of this run.

A checkpoint is a torch file of tensors, numbers, strings and containers of them, so ``weights_only=True`` reads it and
nothing in it is ever executed. Its zip archive carries a checksum per record, which is how a torn file is known.
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

FORMAT = "dfkd_fast.checkpoint/1"
# Fields that may change when a run is resumed without changing the final weights.
_FREE = (
    *((name,) for name in ("out", "resume", "device", "engine", "autotune")),
    *(("loop", name) for name in ("checkpoint_every", "keep_checkpoints")),
)

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, and why."""


def fingerprint(config: DistillConfig) -> str:
    """A hash of everything in a config that determines the final weights of a run."""
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
        folder: where they are; made by the first save.
        config: of the run; a checkpoint of another config is refused.
        teacher: digest of the teacher's weights; a checkpoint of another teacher is refused.
    """

    def __init__(self, folder: Path, config: DistillConfig, teacher: str) -> None:
        self.folder = folder
        self.keep = config.loop.keep_checkpoints
        self.identity = {"config": fingerprint(config), "teacher": teacher}

    def paths(self) -> list[Path]:
        """Checkpoints here, newest first."""
        found = [(re.fullmatch(r"round-(\d+)-step-(\d+)\.pt", path.name), path) for path in self.folder.glob("*.pt")]
        return [path for match, path in sorted(found, key=self._order, reverse=True) if match]

    @staticmethod
    def _order(item: tuple[re.Match[str] | None, Path]) -> tuple[int, int]:
        match, _ = item
        return (int(match[1]), int(match[2])) if match else (-1, -1)

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state dict atomically, flush it to the disk, and delete checkpoints beyond those to keep."""
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
        """The state dict of one checkpoint.

        Raises:
            CheckpointError: torn, of another format, of another config or of another teacher.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except Exception as error:  # broken headers surface as nearly anything
            raise CheckpointError(f"{path.name} is torn or no checkpoint: {error}") from error
        if broken is not None:
            raise CheckpointError(f"{path.name} is torn: the checksum of its record {broken} does not match")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path.name} is foreign: not only tensors and numbers ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path.name} is foreign: it is not a {FORMAT} file")
        for name, expected in self.identity.items():
            if content.get(name) != expected:
                raise CheckpointError(f"{path.name} is foreign: it was written with another {name}")
        return content["state"]

    def newest(self) -> dict[str, Any] | None:
        """The newest sound state, or None if there is no checkpoint. Refused checkpoints are logged.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        reasons = []
        for path in self.paths():
            try:
                return self.read(path)
            except CheckpointError as error:
                reasons.append(str(error))
                log.warning("%s; trying the one before it", error)
        if reasons:
            raise CheckpointError(f"no usable checkpoint in {self.folder}: " + "; ".join(reasons))
        return None
