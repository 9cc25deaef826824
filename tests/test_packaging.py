"""The installed packages, their names and the pinned dependencies."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib import import_module, metadata, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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


def test_version_matches_metadata_changelog_and_tag(repository):
    assert metadata.version("dfkd-fast") == dfkd_fast.__version__
    newest = re.search(r"(?m)^## \[(.+?)\]", (repository / "CHANGELOG.md").read_text())[1]
    assert Version(dfkd_fast.__version__).base_version == newest
    git = ["git", "-C", str(repository), "tag", "--points-at", "HEAD"]
    tags = subprocess.run(git, capture_output=True, text=True).stdout.split() if shutil.which("git") else []
    assert {tag.removeprefix("v") for tag in tags if re.match(r"v?\d", tag)} <= {dfkd_fast.__version__}


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


def copy_sources(repository: Path, to: Path) -> Path:
    """Copies the checkout without build outputs."""
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "out", "*.egg-info", "*.so", "__pycache__")
    return shutil.copytree(repository, to, ignore=ignore)


@pytest.fixture(scope="module")
def site(repository, tmp_path_factory):
    """A wheel built from a copy of the checkout and installed into a temporary folder."""
    folder = tmp_path_factory.mktemp("wheel")
    copy_sources(repository, folder / "source")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--quiet"]
    built = ["wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    # Without the CUDA extension, which takes minutes to build; TestDistributions builds it.
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


# The README's example for one round on random weights, since it downloads weights and takes days.
EXAMPLE = """
import dataclasses, re, sys, timm, dfkd_fast
create, distill = timm.create_model, dfkd_fast.distill
def one_round(teacher, student, config):
    loop = dataclasses.replace(
        config.loop, epochs=1, rounds_per_epoch=1, generator_steps=1, student_steps=1, batch_size=2
    )
    return distill(teacher, student, dataclasses.replace(config, image_size=32, device="cpu", loop=loop))
timm.create_model = lambda name, pretrained=False: create(name)
dfkd_fast.distill = one_round
exec(re.search(r"(?s)```python\\n(.*?)```", open(sys.argv[1]).read())[1], names := {})
from dfkd_fast.ops import extension
print(names["result"].run_dir, dfkd_fast.__file__, extension.UNAVAILABLE)
"""


@pytest.fixture(scope="module")
def dist(repository, tmp_path_factory):
    """The folder that `make wheels` writes in a copy of the checkout, and its output."""
    source = copy_sources(repository, tmp_path_factory.mktemp("wheels") / "source")
    stamp = Path(sys.prefix) / ".installed"
    command = ["make", "--directory", str(source), "--old-file", str(stamp), "wheels"]
    done = subprocess.run([*command, f"VENV={sys.prefix}", "DIST=files"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "files", done.stdout


@pytest.mark.slow
class TestDistributions:
    """The files of ``make wheels``, installed into an empty environment whose dependencies are those of this one."""

    @pytest.mark.parametrize("pattern", ["*.tar.gz", "*-py3-none-any.whl", "*-manylinux_*_x86_64.whl"])
    def test_readme_example_runs(self, dist, pattern, repository, tmp_path):
        (file, *more), shown = sorted(dist[0].glob(pattern)) or [None], dist[1]
        assert not more
        if file is None:
            assert "manylinux" in pattern
            pytest.skip(re.search("installed without its CUDA extension: .*", shown)[0])
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        offline = ["--no-deps", "--no-index", "--quiet"]
        if file.suffix == ".gz":
            built = ["wheel", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(file), *offline]
            subprocess.run([*pip, *built], check=True, env={**os.environ, "DFKD_FAST_CUDA": "0"})
            (file,) = tmp_path.glob("*.whl")
        venv.create(tmp_path / "venv", with_pip=False)
        interpreter = str(tmp_path / "venv" / "bin" / "python")
        subprocess.run([*pip, "--python", interpreter, "install", str(file), *offline], check=True)
        (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
        dependencies = [path for path in sys.path if path.endswith("site-packages")]
        (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))
        command = [interpreter, "-c", EXAMPLE, str(repository / "README.md")]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        run, package, unavailable = done.stdout.splitlines()[-1].split(" ", 2)
        assert (tmp_path / run / "student.safetensors").is_file()
        assert Path(package).is_relative_to(site)
        if "manylinux" in file.name:
            assert unavailable == "None"  # its libraries find those of torch
        else:
            assert "is not built" in unavailable


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
