"""Result files, which record the machine, versions and sources of their numbers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dfkd_fast.config import expand, reading, require_file
from dfkd_fast.files import write_file

__all__ = ["device_slug", "environment", "read_results", "source_digest", "timestamp", "write_results"]

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = {"dfkd_fast": ("*.py",), "kernels": ("*.py",), "csrc": ("*.cu", "*.cpp", "*.h")}


def timestamp() -> str:
    """The current time in UTC as ISO 8601 with seconds, which sorts as text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def source_digest() -> str:
    """Twelve hex digits that identify the package's sources, also without git."""
    digest = hashlib.sha256()
    for folder, patterns in _SOURCES.items():
        for path in sorted(file for pattern in patterns for file in (_ROOT / folder).rglob(pattern)):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit, with ``+`` if files have changed; None outside a checkout of this repository."""
    top = _output("git", "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != _ROOT:
        return None
    commit = _output("git", "rev-parse", "HEAD")
    changed = _output("git", "status", "--porcelain")
    return f"{commit}+" if commit and changed else commit


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    block: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
    index = str(torch.cuda.current_device())
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.memory"
    line = _output("nvidia-smi", f"--id={index}", f"--query-gpu={query}", "--format=csv,noheader,nounits")
    names = ("driver", "power_limit_w", "max_sm_mhz", "max_memory_mhz")
    block |= dict(zip(names, (part.strip() for part in (line or "").split(",")), strict=False))
    return block


def environment() -> dict[str, Any]:
    """The machine and the versions of a measurement.

    Returns:
        ``device`` (name; for a GPU also compute capability, memory, driver, power limit and clocks), ``cpu``,
        ``threads``, ``python``, ``torch``, ``cuda``, ``cudnn``, ``triton`` (None if not installed), ``commit`` (None
        outside a checkout), ``source`` (see :func:`source_digest`) and ``date``.
    """
    import torch

    try:
        import triton
    except ImportError:
        triton_version = None
    else:
        triton_version = triton.__version__
    cuda = torch.cuda.is_available()
    return {
        "device": _gpu() if cuda else {"name": "cpu"},
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "triton": triton_version,
        "commit": _commit(),
        "source": source_digest(),
        "date": timestamp(),
    }


def device_slug(name: str) -> str:
    """A device's name as a folder name: ``NVIDIA H200`` becomes ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _finite_or_none(value: Any) -> Any:
    """Replaces floats that are not finite by None; JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return value


def write_results(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a result file atomically.

    Args:
        path: the file. Missing folders are created.
        content: values of JSON's types; floats that are not finite become null.

    Returns:
        The path.

    Raises:
        TypeError: content contains a type that JSON does not have.
        dfkd_fast.files.WriteError: the file could not be written; its previous content is kept.
    """
    text = json.dumps(_finite_or_none(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_file(path, text.encode())


def read_results(path: str | Path) -> dict[str, Any] | None:
    """Read a result file; None if it does not exist. Numbers that are not finite become None.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a JSON object.
    """
    path = expand(path)
    if not os.path.lexists(path):
        return None
    try:
        with reading(path):
            content = json.loads(require_file(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a result file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a result file: its content is a {type(content).__name__}")
    return _finite_or_none(content)  # Python reads NaN and numbers beyond the range of a double
