"""What this machine offers, in a few lines with reasons. Nothing here is needed to train: the CPU always works."""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Item", "doctor", "find_nvcc", "launches", "report"]


class Item(NamedTuple):
    """One line of the report.

    Attributes:
        item: what was looked for.
        ok: True where it is there and fits, False where it is missing or does not fit.
        detail: version and place, or why not.
    """

    item: str
    ok: bool
    detail: str


def report() -> list[Item]:
    """Look at the machine; never raises. A look that fails becomes a line that says how."""
    looks: list[tuple[str, Callable[[], list[Item]]]] = [
        ("python", _python),
        ("torch", _torch),
        ("device", _devices),
        ("bf16", _bf16),
        ("triton", _triton),
        ("nvcc", _nvcc),
        ("build tools", _build_tools),
        ("CUDA extension", _extension),
        ("onnx export", _onnx),
        ("nvtx", _nvtx),
        ("ops", _ops),
    ]
    lines: list[Item] = []
    for name, look in looks:
        try:
            lines += look()
        except Exception as error:  # a diagnosis must survive what it diagnoses
            lines.append(Item(name, False, f"{type(error).__name__}: {error}"))
    return lines


def doctor() -> int:
    """Print the report.

    Returns:
        0, whatever is missing: absence is an answer.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, ok, detail in report():
        mark = Text("yes", style="green") if ok else Text("no", style="yellow")
        table.add_row(mark, Text(name, style="bold"), Text(detail, overflow="fold"))
    Console().print(table)
    return 0


# The paper's shapes, by the words of ops.extension.launches.
_PAPER: dict[str, dict[str, dict[str, Any]]] = {
    "high_order_attention": {
        f"64x{c}x{side}x{side}": {"positions": 64 * side * side, "channels": c, "hidden": c // 4}
        for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    },
    "spatial_attention": {
        f"64x{c}x{side}x{side}": {"samples": 64, "channels": c, "maps": c // 8, "positions": side * side}
        for c, side in ((256, 28), (128, 56), (64, 112), (64, 224))
    },
    "contrastive_loss": {
        f"{vectors:,} x 128": {"count": vectors // 2, "dim": 128} for vectors in (128, 8192, 65536, 131072)
    },
}

_LAUNCHES_WIDTH = 150


def launches() -> int:
    """Print what the CUDA extension launches at the paper's shapes, in bfloat16, and what that takes of the GPU.

    For each kernel the blocks, in clusters of how many, their threads and shared memory; registers of a thread, bytes
    of it in local memory, blocks at a time on a multiprocessor and the share of its threads that these are. Without a
    GPU the last four stay empty.

    Returns:
        0.
    """
    from rich.console import Console
    from rich.table import Table

    from dfkd_fast.ops import extension

    console = Console()
    console = Console(width=max(console.width, _LAUNCHES_WIDTH))  # a wrapped table of this cannot be read
    if extension.UNAVAILABLE is not None:
        console.print(extension.UNAVAILABLE)
        return 0
    absent = extension.unavailable("hopper")
    without: RuntimeError | None = None
    for op, shapes in _PAPER.items():
        table = Table(title=f"{op}, bfloat16", title_justify="left", box=None, pad_edge=False)
        for name in ("shape", "pass", "backend", "kernel"):
            table.add_column(name, overflow="fold")
        for name in ("blocks", "cluster", "threads", "shared KB", "registers", "local B", "at a time", "occupancy"):
            table.add_column(name, justify="right")
        for shape, sizes in shapes.items():
            for backend in ("cuda", "hopper")[: 2 if absent is None else 1]:
                for which, name in (("forward", op), ("backward", f"{op}_backward")):
                    if not extension.supported(name, backend, **sizes):
                        table.add_row(shape, which, backend, "not served")
                        continue
                    try:
                        found = extension.launches(name, backend, resources=without is None, **sizes)
                    except RuntimeError as error:
                        without = error
                        found = extension.launches(name, backend, resources=False, **sizes)
                    for number, each in enumerate(found):
                        names = (shape, which, backend) if number == 0 else ("", "", "")
                        table.add_row(*names, *_launch_cells(each))
        console.print(table)
    for reason in (absent, without):
        if reason is not None:
            console.print(str(reason))
    return 0


def _launch_cells(launch: dict[str, Any]) -> list[str]:
    grid = [size for size in launch["grid"] if size > 1] or [1]
    shared = launch["dynamic_shared"] + launch.get("static_shared", 0)
    kernel = re.sub(r"\w+::", "", launch["kernel"])
    cells = [kernel, " x ".join(map(str, grid)), str(launch["cluster"]) if launch["cluster"] > 1 else ""]
    cells += [str(math.prod(launch["block"])), f"{shared / 1024:.1f}"]
    if "registers" in launch:
        cells += [str(launch[name]) for name in ("registers", "local", "blocks_per_multiprocessor")]
        cells.append(f"{launch['occupancy']:.0%}")
    return cells


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _python() -> list[Item]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [Item("python", True, f"{platform.python_version()}, {platform.machine()}, {threads} CPU threads to run on")]


def _torch() -> list[Item]:
    import torch

    build = f"built with CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [Item("torch", True, f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")]


def _no_device() -> str:
    """Why torch sees no CUDA device."""
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA; a CUDA build is needed"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every device"
    if not Path("/proc/driver/nvidia/version").exists() and not Path("/dev/nvidiactl").exists():
        return "no NVIDIA driver is loaded"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "the driver is loaded, but offers no device"


def _devices() -> list[Item]:
    import torch

    if not torch.cuda.is_available():
        return [Item("CUDA device", False, f"{_no_device()}; everything runs on the CPU")]
    built = torch.cuda.get_arch_list()
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        fits = any(int(re.sub(r"\D", "", arch)) <= 10 * device.major + device.minor for arch in built)
        detail = (
            f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.0f} GiB, "
            f"{device.multi_processor_count} multiprocessors"
        )
        if not fits:
            detail += f"; this torch is built for {', '.join(built)}"
        lines.append(Item(f"CUDA device {index}", fits, detail))
    return lines


def _bf16() -> list[Item]:
    import torch

    if not torch.cuda.is_available():
        return [Item("bf16 autocast", False, "not on the CPU by default: float32 is used there")]
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return [Item("bf16 autocast", True, "computed by the device; the default precision")]
    return [
        Item("bf16 autocast", False, "the device would only emulate it (needs compute capability 8.0); float32 is used")
    ]


def _triton() -> list[Item]:
    import torch

    version = _version("triton")
    if version is None:
        return [Item("triton", False, "not installed; comes with torch's CUDA builds for Linux")]
    if importlib.util.find_spec("triton") is None:
        return [Item("triton", False, f"{version} is installed but cannot be found")]
    if not torch.cuda.is_available():
        return [Item("triton", False, f"{version} is installed; its kernels need a CUDA device")]
    return [Item("triton", True, version)]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def find_nvcc() -> str | None:
    """Where torch's extension builder would look: CUDA_HOME, then PATH, then the usual place."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def _nvcc() -> list[Item]:
    import torch

    path = find_nvcc()
    if path is None:
        return [Item("nvcc", False, "not on PATH, nor under CUDA_HOME or /usr/local/cuda; CUDA C++ is not compiled")]
    found = re.search(r"release (\d+)\.(\d+)", _run(path, "--version"))
    if found is None:
        return [Item("nvcc", False, f"{path} does not say its version")]
    version, torch_cuda = f"{found[1]}.{found[2]}", torch.version.cuda
    if torch_cuda is None:
        return [Item("nvcc", False, f"{version} at {path}, but this torch is built without CUDA")]
    same = found[1] == torch_cuda.split(".")[0]
    # Across major versions torch refuses to build; minor versions are compatible with each other.
    suffix = f"torch is built with {torch_cuda}" + ("" if same else ": another major version, which torch refuses")
    return [Item("nvcc", same, f"{version} at {path}; {suffix}")]


def _build_tools() -> list[Item]:
    found, missing = [], []
    for name in ("g++", "cmake", "ninja"):
        if shutil.which(name) is None:
            missing.append(name)
            continue
        version = re.search(r"\d+(\.\d+)+", _run(name, "--version").splitlines()[0])
        found.append(f"{name} {version[0]}" if version else name)
    detail = ", ".join(found) + (f"; not found: {', '.join(missing)}" if missing else "")
    return [Item("build tools", not missing, detail.removeprefix("; "))]


def _extension() -> list[Item]:
    from dfkd_fast.ops import extension

    found = extension.build()
    if found is None:
        return [Item("CUDA extension", False, str(extension.UNAVAILABLE))]
    code = ", ".join(found["architectures"])
    return [Item("CUDA extension", True, f"CUDA {found['toolkit']}, code for {code}, commit {found['commit']}")]


def _onnx() -> list[Item]:
    names = ("onnx", "onnxscript", "onnxruntime")
    versions = {name: _version(name) for name in names}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return [Item("onnx export", False, f"not installed: {', '.join(missing)} (pip install 'dfkd-fast[onnx]')")]
    return [Item("onnx export", True, ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _nvtx() -> list[Item]:
    version = _version("nvtx")
    return [
        Item("nvtx", version is not None, version or "not installed (pip install 'dfkd-fast[nvtx]'); marks profiles")
    ]


def _ops() -> list[Item]:
    """Which backends the ops have, as :mod:`dfkd_fast.ops` itself tells; one line for those that have the same."""
    from dfkd_fast import ops

    alike: dict[tuple[str, ...], list[str]] = {}
    for name, backends in ops.backends().items():
        alike.setdefault(backends, []).append(name)
    return [
        Item("ops", bool(backends), f"{', '.join(backends)}: {', '.join(names)}") for backends, names in alike.items()
    ]
