"""The installed packages, their names and the pinned dependencies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module, metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dfkd_fast

MAPPED = ("kernels", "configs", "benchmarks")


def python(code: str, folder: Path, **environment: str) -> str:
    """Run code in a new interpreter in ``folder`` and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="session")
def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line of constraints.txt must be NAME==VERSION"
    return {canonicalize_name(name): version for name, version in pairs}


def test_version_matches_metadata():
    assert metadata.version("dfkd-fast") == dfkd_fast.__version__


def test_pins_satisfy_every_requirement(project, pins):
    expected = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, expected):
        if requirement.name == project["name"]:
            continue
        assert canonicalize_name(requirement.name) in pins, requirement.name
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_transitive_requirements_are_pinned(project, pins):
    """Follows the requirements of the installed packages, starting from dfkd-fast."""
    seen, waiting = set(), {("dfkd-fast", extra) for extra in ("", *project["optional-dependencies"])}
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed; its pin is checked below
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                child = canonicalize_name(requirement.name)
                assert child in pins or child == "dfkd-fast", f"{child}, required by {name}, is not pinned"
                waiting |= {(child, each) for each in ("", *requirement.extras)} - seen


def test_mapped_folders_are_not_top_level_packages(tmp_path):
    code = "import importlib.util as u; print([n for n in ('kernels', 'configs', 'benchmarks') if u.find_spec(n)])"
    assert python(code, tmp_path) == "[]"


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_belong_to_the_imported_package(repository, folder):
    package = Path(import_module(f"dfkd_fast.{folder}").__file__).parent
    editable = Path(dfkd_fast.__file__).is_relative_to(repository)
    assert package == (repository / folder if editable else Path(dfkd_fast.__file__).parent / folder)


def test_configs_are_package_resources(repository):
    inside = {entry.name for entry in resources.files("dfkd_fast.configs").iterdir() if entry.name.endswith(".yaml")}
    assert inside == {path.name for path in (repository / "configs").glob("*.yaml")}
    assert inside


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """A wheel built from a copy of the checkout and installed into a temporary folder."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(repository, folder / "source", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    built = ["wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    # Without the CUDA extension, which takes minutes to build; tests/cuda/test_extension.py builds it.
    pure = {**os.environ, "DFKD_FAST_CUDA": "0"}
    subprocess.run([*pip, *built, *offline], check=True, capture_output=True, env=pure)
    (wheel,) = folder.glob("*-py3-none-any.whl")
    subprocess.run([*pip, "install", "--target", str(folder / "site"), str(wheel), *offline], check=True)
    return folder / "site"


class TestWheel:
    def test_contains_all_modules_and_configs(self, site, repository):
        top = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
        assert top <= {"dfkd_fast", "bin"}
        sources = {path.relative_to(repository) for path in (repository / "dfkd_fast").rglob("*.py")}
        for folder in MAPPED:
            sources |= {
                Path("dfkd_fast") / path.relative_to(repository)
                for path in (repository / folder).rglob("*.*")
                if path.suffix in (".py", ".yaml", ".json")
            }
        missing = [str(path) for path in sorted(sources) if not (site / path).exists()]
        assert not missing
        assert (site / "dfkd_fast" / "py.typed").exists()
        assert (site / "dfkd_fast" / "templates" / "report.html").exists()
        assert not list(site.rglob("dfkd_fast/*.so"))

    def test_imports_from_another_folder(self, site, tmp_path):
        code = (
            "import dfkd_fast, dfkd_fast.cli, dfkd_fast.kernels, dfkd_fast.benchmarks.plan\n"
            "from dfkd_fast.config import find\n"
            "print(dfkd_fast.__file__, find('aircraft'))"
        )
        module, config = python(code, tmp_path, PYTHONPATH=str(site)).split()
        assert Path(module).is_relative_to(site)
        assert Path(config).is_relative_to(site)

    def test_contains_the_license(self, site):
        (license,) = site.glob("*.dist-info/licenses/LICENSE")
        assert "Apache License" in license.read_text()


class TestMake:
    @pytest.fixture(autouse=True)
    def _make(self, repository):
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        self.root = repository

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", "--directory", str(self.root), *arguments], capture_output=True, text=True)

    def test_help_lists_every_target(self):
        text = (self.root / "Makefile").read_text()
        phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)[1].split()
        listed = re.findall(r"^  make (\S+)", self.make().stdout, re.MULTILINE)
        assert sorted(listed) == sorted(phony)

    def test_old_python_is_rejected_with_advice(self, tmp_path):
        old = tmp_path / "old-python"
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
        old.chmod(0o755)
        done = self.make("lint", f"PYTHON={old}", f"VENV={tmp_path}/venv")
        assert done.returncode != 0
        assert "Python 3.11 or newer is needed" in done.stderr
        assert "Python 3.9.2" in done.stderr
        assert "PYTHON=python3.12" in done.stderr
        assert not (tmp_path / "venv").exists()

    def test_python_without_venv_is_rejected(self, tmp_path):
        bare = tmp_path / "bare-python"
        bare.write_text('#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\nexit 0\n')
        bare.chmod(0o755)
        done = self.make("test", f"PYTHON={bare}", f"VENV={tmp_path}/venv")
        assert done.returncode != 0
        assert "lacks the venv module" in done.stderr

    def test_gpu_target_creates_no_environment_and_uses_no_network(self):
        plan = self.make("--dry-run", "gpu", "OUT=here", "CALL=2", "VENV=none").stdout
        assert "-m venv" not in plan
        assert "--no-index" in plan
        assert "--no-build-isolation" in plan
        assert "--call 2 --out 'here'" in plan
