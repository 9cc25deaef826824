"""Files of every format that contain a program, which runs if a reader trusts them."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from .. import tiny

__all__ = ["META", "WRITERS", "Program"]

META = {"num_classes": "5", "image_size": "16", "classes": json.dumps(list("abcde")), "mean": "0.5", "model": "resnet8"}


class Program:
    """Pickles to a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _tar(path: Path, content: Any) -> None:
    """The format of torch before 2017."""
    (path.parent / "pickle").write_bytes(pickle.dumps(content))
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "pickle", "pickle")


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
