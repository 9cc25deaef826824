"""Rules of the code base: layers, one name per op, function length, and no absolute paths."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from dfkd_fast import ops
from dfkd_fast.benchmarks.ops.cases import BENCHMARKS

ROOT = Path(__file__).parents[1]
PACKAGE = "dfkd_fast"
MAPPED = ("kernels", "configs", "benchmarks")  # top-level folders, installed as dfkd_fast.<name>

# The parts of the package that each part may import. A new top-level folder or module needs a line here.
LAYERS: dict[str, set[str]] = {
    "_C": set(),  # the CUDA extension
    "collectives": set(),
    "command_inputs": {"config", "data", "graph", "models"},
    "config": set(),
    "configs": set(),
    "kernels": set(),
    "deprecated": set(),
    "files": {"config"},
    "jobs": set(),
    "nvtx": set(),
    "ranges": {"deprecated"},
    "reference": {"collectives"},
    "registry": set(),
    "synthesis": {"collectives", "config", "data", "files", "graph", "models", "registry"},
    "testing": set(),
    "ops": {"collectives", "reference", "kernels", "nvtx", "_C", "deprecated"},
    "nn": {"collectives", "ops", "deprecated", "registry"},
    "compat": {"ops"},
    "graph": {"nn", "ops"},
    "models": {"graph", "config", "deprecated", "files", "registry"},
    "objectives": {"collectives", "nn", "ops", "graph", "config", "registry"},
    "data": {"collectives", "config", "registry"},
    "report": {"config", "files"},
    "doctor": {"ops", "report", "engine"},
    "engine": {
        "collectives",
        "objectives",
        "synthesis",
        "nn",
        "ops",
        "graph",
        "models",
        "data",
        "report",
        "config",
        "files",
        "nvtx",
        "registry",
    },
    "sweep": {"command_inputs", "config", "data", "engine", "files", "graph", "jobs", "models", "profiling", "report"},
    "run_page": {"engine", "objectives", "nn", "graph", "models", "data", "report", "config", "files", "sweep"},
    "profiling": {"engine", "graph", "models", "report", "config", "nvtx"},
}
ENTRY_POINTS = {"__init__", "__main__", "cli", "demo", "benchmarks"}  # may import everything


def walk(folder: Path) -> Iterator[Path]:
    """Files of the repository, without build outputs and hidden folders."""
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.name not in (".ci", ".gitignore")
        built = path.name in ("build", "dist", "runs", "out", "__pycache__") or path.suffix == ".egg-info"
        if hidden or built or (path / "pyvenv.cfg").exists():
            continue
        if path.is_dir():
            yield from walk(path)
        elif path.is_file():
            yield path


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and path of every module of the package."""
    for folder in (PACKAGE, *MAPPED):
        for path in walk(ROOT / folder):
            if path.suffix == ".py":
                parts = path.relative_to(ROOT).with_suffix("").parts
                yield ".".join(parts if folder == PACKAGE else (PACKAGE, *parts)), path


def imports(source: str, module: str) -> Iterator[str]:
    """Full names imported anywhere in a module, by statements or by import_module with a literal."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                inside = module.removesuffix(".__init__").split(".")
                keep = len(inside) - node.level + module.endswith(".__init__")
                base = ".".join([*inside[:keep], *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def part(name: str) -> str | None:
    """The part of the package that a full name belongs to, or None for third-party packages."""
    first, *rest = name.split(".")
    if first != PACKAGE:
        return None
    if not rest or rest[0] == "__version__":
        return "__version__"
    # `from dfkd_fast import distill` imports the package's __init__.
    there = any((ROOT / PACKAGE / each).exists() for each in (rest[0], f"{rest[0]}.py"))
    return rest[0] if there or rest[0] in (*MAPPED, "_C") else "__init__"


def forbidden_imports(source: str, module: str) -> list[str]:
    """Imports of a module that its layer does not allow."""
    own = part(module)
    if own in ENTRY_POINTS:
        return []
    allowed = LAYERS[own] | {own, "__version__", None}
    return [name for name in imports(source, module) if part(name) not in allowed]


def test_every_part_has_a_layer():
    assert {part(module) for module, _ in modules()} <= LAYERS.keys() | ENTRY_POINTS


def test_imports_respect_layers():
    wrong = {module: names for module, path in modules() if (names := forbidden_imports(path.read_text(), module))}
    assert not wrong, f"these imports are not allowed: {wrong}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dfkd_fast.nn.attention", "def f():\n    import dfkd_fast.kernels.spatial_attention"),
        ("dfkd_fast.ops.backend", "from ..nn import attention"),
        ("dfkd_fast.ops.__init__", "from .. import config"),
        ("dfkd_fast.models", "from dfkd_fast import distill"),
        ("dfkd_fast.graph.extract", "from importlib import import_module\nimport_module('dfkd_fast.engine')"),
        ("dfkd_fast.data.digits", "if TYPE_CHECKING:\n    from dfkd_fast.models import Outputs"),
    ],
)
def test_forbidden_imports_are_found(module, source):
    assert forbidden_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("dfkd_fast.ops.backend", "from .checks import require_choice\nfrom ..reference import common\nimport torch"),
        ("dfkd_fast.engine.loop", "from dfkd_fast import __version__, ops\nfrom dfkd_fast.objectives import Term"),
        ("dfkd_fast.cli", "from dfkd_fast.engine import distill"),
    ],
)
def test_allowed_imports_are_not_reported(module, source):
    assert not forbidden_imports(source, module)


INFRASTRUCTURE = ("__init__", "backend", "checks", "choices", "custom_op", "extension")
OPS = sorted(p.stem for p in (ROOT / PACKAGE / "ops").glob("*.py") if p.stem not in INFRASTRUCTURE)


@pytest.mark.parametrize("name", OPS)
def test_op_has_the_same_name_everywhere(name):
    assert any((ROOT / "tests").rglob(f"test_{name}.py")), f"op {name} has no test_{name}.py"
    for path in (f"dfkd_fast/reference/{name}.py", f"kernels/{name}.py"):
        assert (ROOT / path).is_file(), f"op {name} has no {path}"
    assert callable(getattr(ops, name))
    assert name in ops.backends()
    assert name in BENCHMARKS


def kernel_stems() -> set[str]:
    """Ops with Triton kernels."""
    stems = {p.stem for p in (ROOT / "kernels").glob("*.py")} - {"__init__", "common", "config"}
    return {re.sub(r"_(fwd|bwd)$", "", stem) for stem in stems}


def csrc_stems() -> set[str]:
    """Ops with CUDA C++ kernels."""
    return {re.sub(r"_bwd$", "", path.stem) for path in (ROOT / "csrc").glob("*.cu")}


def test_no_reference_or_kernel_without_an_op():
    stems = {p.stem for p in (ROOT / PACKAGE / "reference").glob("*.py")} - {"__init__", "common"}
    stems |= kernel_stems() | csrc_stems()
    assert stems <= set(OPS), f"no op of this name in dfkd_fast/ops: {sorted(stems - set(OPS))}"


def test_every_kernel_has_benchmark_cases():
    assert kernel_stems() | csrc_stems() <= BENCHMARKS.keys(), "no cases in benchmarks/ops/cases.py"


def test_ops_import_with_only_torch_and_triton():
    """docs/install.md promises this for `pip install --no-deps`."""
    foreign = ["torchvision", "timm", "jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "PIL", "tensorboard"]
    foreign += ["torchmetrics", "safetensors", "yaml", "onnx", "onnxruntime", "onnxscript"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({foreign}))\n"
        "import torch; from dfkd_fast import ops\n"
        "print(ops.distillation_kl(torch.zeros(2, 3), torch.zeros(2, 3)).item())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "0.0"


def test_only_cli_and_config_files_need_jsonargparse():
    """Everything imports without jsonargparse and nvtx, which some GPU machines lack, and without extras."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['jsonargparse', 'nvtx', 'wandb', 'mlflow']))\n"
        "import dfkd_fast, dfkd_fast.cli, dfkd_fast.demo, dfkd_fast.doctor, dfkd_fast.profiling\n"
        "import dfkd_fast.benchmarks.plan, dfkd_fast.benchmarks.record_tests\n"
        "[getattr(dfkd_fast, name) for name in dfkd_fast.__all__]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    sources = (*walk(ROOT / "dfkd_fast"), *walk(ROOT / "benchmarks"))
    pattern = re.compile(r"(?m)^\s*(?:import|from) jsonargparse\b")
    users = {path.name for path in sources if path.suffix == ".py" and pattern.search(path.read_text(encoding="utf-8"))}
    assert users == {"cli.py", "config.py"}


def test_tests_with_over_2_31_elements_are_marked_large_memory():
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "2 ** 31" in ast.unparse(node):
                marks = [ast.unparse(mark) for mark in node.decorator_list]
                if "pytest.mark.gpu" in marks:
                    found[f"{path.name}::{node.name}"] = "pytest.mark.large_memory" in marks
    assert len(found) >= 6
    assert all(found.values()), [name for name, marked in found.items() if not marked]


@pytest.mark.slow
def test_large_memory_tests_run_one_at_a_time(tmp_path):
    """This holds with several processes, and also after one of them dies."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_large.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.large_memory\n"
        "@pytest.mark.parametrize('number', range(4))\n"
        "def test_large(number):\n"
        "    os.close(os.open(__file__ + '.running', os.O_CREAT | os.O_EXCL))\n"
        "    time.sleep(0.5)\n"
        "    os.remove(__file__ + '.running')\n"
        "    if number == 1:\n"
        "        os.abort()\n"
    )
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "2", f"--basetemp={tmp_path / 'temporary'}", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert re.search("1 failed, 3 passed", done.stdout), done.stdout[-2000:] + done.stderr[-2000:]
    assert "crashed while running 'test_large.py::test_large[1]'" in done.stdout


def test_layers_have_no_cycle():
    """The layers have a topological order."""
    graphlib.TopologicalSorter(LAYERS).prepare()  # raises a CycleError


def test_old_names_warn():
    from dfkd_fast import models, nn, nvtx

    ranges, backend = (import_module(f"dfkd_fast.{name}") for name in ("ranges", "ops.backend"))
    for module, old, new in (
        (models, "held_in", models.cast_weights),
        (nn, "spectral_norm_held", nn.freeze_spectral_norm),
        (ranges, "span", nvtx.nvtx_range),
        (backend, "Unserved", backend.UnsupportedError),
    ):
        with pytest.warns(DeprecationWarning, match=rf"{old} is now {new.__module__.partition('.')[0]}"):
            assert getattr(module, old) is new
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            module.__getattr__("nothing")


def test_functions_have_at_most_80_lines():
    """Functions in kernels/ are exempt."""
    long = {}
    for path in walk(ROOT):
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] != "kernels":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 80:
                    long[f"{path.relative_to(ROOT)}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert not long, f"over 80 lines: {long}"


def test_no_absolute_paths():
    found = []
    pattern = re.compile(r"(?<![\w.~-])/(?:home|root|work|Users)/\w")
    for path in walk(ROOT):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # an image
        found += [
            f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(text.splitlines(), 1) if pattern.search(line)
        ]
    assert not found, f"absolute paths: {found}"
