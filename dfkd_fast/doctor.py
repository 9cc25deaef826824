"""Reports which optional features this machine supports. Training works on any CPU without them."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfkd_fast import ops
from dfkd_fast.ops import extension
from dfkd_fast.report import result_table

__all__ = ["Item", "doctor", "find_nvcc", "launches", "report"]


class Item(NamedTuple):
    """One line of the report.

    Attributes:
        item: name of the feature.
        ok: whether it is available.
        detail: version and location, or the reason why it is unavailable.
    """

    item: str
    ok: bool
    detail: str


def report() -> list[Item]:
    """Run all checks. Never raises: a failed check becomes a line with its error."""
    lines: list[Item] = []
    for name, check in _CHECKS.items():
        try:
            lines += check()
        except Exception as error:
            lines.append(Item(name, False, f"{type(error).__name__}: {error}"))
    return lines


def doctor() -> None:
    """Print the report."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, ok, detail in report():
        mark = Text("yes", style="green") if ok else Text("no", style="yellow")
        table.add_row(mark, Text(name, style="bold"), Text(detail, overflow="fold"))
    Console().print(table)


# The paper's shapes, and larger batches of the contrastive loss, as arguments of ops.extension.launches.
_PAPER: dict[str, dict[str, dict[str, Any]]] = {
    "high_order_attention": {
        f"64x{c}x{side}x{side}": {"positions": 64 * side * side, "channels": c, "hidden": c // 4}
        for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    },
    "spatial_attention": {
        f"64x{c}x{side}x{side}": {"samples": 64, "channels": c, "hidden": c // 8, "positions": side * side}
        for c, side in ((256, 28), (128, 56), (64, 112), (64, 224))
    },
    "contrastive_loss": {
        f"{vectors:,} x 128": {"count": vectors // 2, "dim": 128} for vectors in (128, 8192, 65536, 131072)
    },
}

_MIN_WIDTH = 150  # in narrower consoles, every cell of the wide tables would wrap


def launches() -> None:
    """Print the kernels that the CUDA extension launches at the shapes of the paper and at larger ones, in bfloat16.

    The tables list the number of blocks, the cluster size, threads and shared memory per block. With a GPU, they
    also list the registers and bytes of local memory per thread, the blocks per SM and the occupancy.
    """
    console = Console(width=max(Console().width, _MIN_WIDTH))
    if extension.UNAVAILABLE is not None:
        console.print(extension.UNAVAILABLE)
        return
    resources = torch.cuda.is_available()
    for op, shapes in _PAPER.items():
        rows: list[dict[str, Any]] = []
        for shape, sizes in shapes.items():
            for which, name in (("forward", op), ("backward", f"{op}_backward")):
                row = {"shape": shape, "pass": which}
                if (reason := extension.unsupported_reason(name, **sizes)) is not None:
                    rows.append({**row, "kernel": f"not supported: {reason}"})
                else:
                    found = extension.launches(name, resources=resources, **sizes)
                    rows += [{**row, **_launch_cells(each)} for each in found]
        console.print(result_table(rows, f"{op}, bfloat16"))
    if not resources:
        console.print("Showing registers and occupancy needs a GPU.")


def _launch_cells(launch: dict[str, Any]) -> dict[str, Any]:
    cells = {
        "kernel": re.sub(r"\w+::", "", launch["kernel"]),
        "blocks": " x ".join(str(size) for size in launch["grid"] if size > 1) or "1",
        "cluster": launch["cluster"] if launch["cluster"] > 1 else None,
        "threads": math.prod(launch["block"]),
        "shared KB": f"{(launch['dynamic_shared'] + launch.get('static_shared', 0)) / 1024:.1f}",
    }
    columns = {"registers": "registers", "local": "local B", "blocks_per_multiprocessor": "blocks/SM"}
    if "registers" in launch:
        cells |= {title: launch[name] for name, title in columns.items()}
        cells["occupancy"] = f"{launch['occupancy']:.0%}"
    return cells


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Item]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Item("python", True, f"{platform.python_version()}, {platform.machine()}, {threads} CPU threads available")
    build = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield Item("torch", True, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _no_device() -> str:
    """The reason why torch has no CUDA device."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA; install a CUDA build"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all devices"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0].split(". ")[0]
    return "the driver is loaded, but finds no device"


def _devices() -> Iterator[Item]:
    from dfkd_fast.engine import supports_bf16  # imports timm; if it fails, the report says so

    if not torch.cuda.is_available():
        yield Item("CUDA device", False, f"{_no_device()}; everything runs on the CPU")
        cpu = supports_bf16(torch.device("cpu"))
        emulated = "this CPU has neither AMX nor AVX512-BF16; the default is float32"
        yield Item(
            "bf16 autocast", cpu, "the CPU has bfloat16 instructions; the default precision" if cpu else emulated
        )
        return
    built = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        fits = any(int(re.sub(r"\D", "", arch)) <= 10 * device.major + device.minor for arch in built)
        detail = f"{device.name}, compute capability {device.major}.{device.minor}, "
        detail += f"{device.total_memory / 2**30:.0f} GiB, {device.multi_processor_count} SMs"
        detail += "" if fits else f"; this torch is built for {', '.join(built)}"
        yield Item(f"CUDA device {index}", fits, detail)
    bf16 = supports_bf16(torch.device("cuda"))
    emulated = "only emulated (native support needs compute capability 8.0); the default is float32"
    yield Item("bf16 autocast", bf16, "supported; the default precision" if bf16 else emulated)


def _triton() -> Iterator[Item]:
    version = _version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        yield Item("triton", False, "not installed; torch's CUDA builds for Linux include it")
    else:
        cuda = torch.cuda.is_available()
        yield Item("triton", cuda, version if cuda else f"{version} is installed, but its kernels need a CUDA device")


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def find_nvcc() -> str | None:
    """Find nvcc like torch's extension builder: in CUDA_HOME, CUDA_PATH, PATH, then /usr/local/cuda."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    default = "/usr/local/cuda/bin/nvcc"
    return shutil.which("nvcc") or (default if Path(default).exists() else None)


def _nvcc() -> Iterator[Item]:
    path, torch_cuda = find_nvcc(), torch.version.cuda
    if path is None:
        yield Item("nvcc", False, "not found on PATH, in CUDA_HOME or in /usr/local/cuda; CUDA C++ cannot be compiled")
        return
    found = re.search(r"release ((\d+)\.\d+)", _run(path, "--version"))
    if found is None:
        yield Item("nvcc", False, f"{path} does not print its version")
    elif torch_cuda is None:
        yield Item("nvcc", False, f"{found[1]} at {path}, but this torch is built without CUDA")
    else:
        # torch refuses to build with another major version; minor versions are compatible.
        same = found[2] == torch_cuda.split(".")[0]
        suffix = "" if same else ", another major version, which torch does not support"
        yield Item("nvcc", same, f"{found[1]} at {path}; torch is built with {torch_cuda}{suffix}")


def _build_tools() -> Iterator[Item]:
    details, missing = [], []
    for name in ("g++", "cmake", "ninja"):
        if shutil.which(name) is None:
            missing.append(name)
        else:
            version = re.search(r"\d+(\.\d+)+", _run(name, "--version"))
            details.append(f"{name} {version[0]}" if version else name)
    if missing:
        details.append(f"not found: {', '.join(missing)}")
    yield Item("build tools", not missing, ", ".join(details))


def _extension() -> Iterator[Item]:
    found = extension.build()
    if found is None:
        yield Item("CUDA extension", False, str(extension.UNAVAILABLE))
    else:
        built = f"CUDA {found['toolkit']}, {found['architecture']}, commit {found['commit']}"
        yield Item("CUDA extension", True, f"{built}; needs compute capability 9.0, other devices use Triton")


def _extras() -> Iterator[Item]:
    extras = {"onnx export": ("onnx", ["onnx", "onnxscript", "onnxruntime"]), "nvtx": ("nvtx", ["nvtx"])}
    for item, (extra, names) in extras.items():
        missing = [name for name in names if _version(name) is None]
        absent = f"not installed: {', '.join(missing)} (pip install 'dfkd-fast[{extra}]')"
        yield Item(item, not missing, absent if missing else ", ".join(f"{name} {_version(name)}" for name in names))


def _ops() -> Iterator[Item]:
    """List the ops by their available backends."""
    by_backends: dict[tuple[str, ...], list[str]] = {}
    for name, backends in ops.backends().items():
        by_backends.setdefault(backends, []).append(name)
    for backends, names in by_backends.items():
        yield Item("ops", bool(backends), f"{', '.join(backends)}: {', '.join(names)}")


_CHECKS = {
    "python": _python,
    "CUDA device": _devices,
    "triton": _triton,
    "nvcc": _nvcc,
    "build tools": _build_tools,
    "CUDA extension": _extension,
    "extras": _extras,
    "ops": _ops,
}
