"""Package folders and the CUDA extension. All other metadata is in pyproject.toml.

``kernels/``, ``configs/`` and ``benchmarks/`` are top-level folders of the repository, installed as
``dfkd_fast.kernels``, ``dfkd_fast.configs`` and ``dfkd_fast.benchmarks``.

CMake builds the extension (CMakeLists.txt). If it cannot be built, the package is installed without it and prints the
reason; ops then run on Triton or the reference. ``DFKD_FAST_CUDA=0`` skips the extension, ``DFKD_FAST_CUDA=1`` turns
its absence into an error.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MAPPED = ("kernels", "configs", "benchmarks")

packages = find_packages(include=["dfkd_fast", "dfkd_fast.*"])
package_dir = {"dfkd_fast": "dfkd_fast"}
for folder in MAPPED:
    package_dir[f"dfkd_fast.{folder}"] = folder
    packages.append(f"dfkd_fast.{folder}")
    packages.extend(f"dfkd_fast.{folder}.{name}" for name in find_packages(folder))


def find_program(name: str) -> str | None:
    """Finds a program on the PATH or next to this Python, where pip installs programs."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def nvcc() -> str | None:
    """Returns the path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(found)] if (found := shutil.which("nvcc")) else []
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(path) for path in candidates if path.exists()), None)


def missing() -> str | None:
    """Returns why the extension cannot be built; None if it can."""
    if os.environ.get("DFKD_FAST_CUDA") == "0":
        return "DFKD_FAST_CUDA is 0"
    if not any((ROOT / "csrc").glob("*.cu")):
        return "this source tree has no csrc/*.cu"
    if nvcc() is None:
        return "no nvcc is on the PATH or under CUDA_HOME"
    for program in ("cmake", "ninja"):
        if find_program(program) is None:
            return f"no {program} is on the PATH (pip install {program})"
    for module in ("torch", "pybind11"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed (install it first, then this with pip's --no-build-isolation)"
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    # Read from the file, because importing torch takes seconds.
    if re.search(r"^cuda\b.*= None$", (Path(torch.origin).parent / "version.py").read_text(), re.MULTILINE):
        return "torch is built without CUDA"
    return None


class CMakeBuild(build_ext):
    """Builds the three libraries of CMakeLists.txt into the folder of the one that setuptools knows."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        folder = Path(self.build_temp).resolve() / "cmake"
        folder.mkdir(parents=True, exist_ok=True)
        cmake, ninja = find_program("cmake"), find_program("ninja")
        assert cmake is not None
        options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(folder), *options, f"-DDFKD_OUTPUT={output}"], check=True)
            subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"dfkd_fast: the CUDA extension was not built: {error}; see the output above. "
                "Set DFKD_FAST_CUDA=0 to install the package without it"
            ) from error

    def copy_extensions_to_source(self) -> None:
        """For an editable install: copies all three libraries, of which setuptools knows one."""
        super().copy_extensions_to_source()
        for library in (Path(self.build_lib) / "dfkd_fast").glob("*.so"):
            shutil.copy2(library, ROOT / "dfkd_fast" / library.name)


reason = missing()
if reason is not None and os.environ.get("DFKD_FAST_CUDA") == "1":
    raise SystemExit(f"dfkd_fast: DFKD_FAST_CUDA is 1, but the CUDA extension cannot be built: {reason}")
if reason is not None and {"bdist_wheel", "editable_wheel", "build", "install"} & set(sys.argv):
    print(f"dfkd_fast: installed without its CUDA extension: {reason}", file=sys.stderr)

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "dfkd_fast": ["py.typed", "templates/*"],
        "dfkd_fast.kernels": ["*.json"],
        "dfkd_fast.configs": ["*.yaml", "*/*.yaml"],
        "dfkd_fast.benchmarks": ["*.yaml", "ops/*.yaml", "results/*/*.json"],
    },
    ext_modules=[] if reason is not None else [Extension("dfkd_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
