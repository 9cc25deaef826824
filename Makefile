# The commands of this repository. All but `gpu` run in .venv, which they make from pyproject.toml and constraints.txt.
#   PYTHON=python3.12   the interpreter that .venv is made from (and that `gpu` uses in place)
#   WORKERS=4           processes that run tests

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= auto
OUT ?= out/gpu
BUDGET ?= 540

PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# One thread a worker: the workers are the parallelism, and results do not depend on the number of cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --maxprocesses 8

.PHONY: help demo test test-all lint format docs gpu wheels kernels report clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
		echo "Name another with PYTHON=..., for example: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks the venv module (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@echo "Installing into $(VENV) (the first time: some gigabytes of wheels, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools wheel cmake ninja pybind11 torch
	@$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## teach, distil and evaluate on two small sets, on the CPU or a GPU
	@$(BIN)/dfkd-fast demo

test: $(STAMP)  ## the quick tests
	@$(PYTEST)

test-all: $(STAMP)  ## every test: the long sweeps, the wheel
	@$(PYTEST) -m ""

lint: $(STAMP)  ## ruff (rules and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP)  ## the documentation site, into out/site
	@$(ONE_THREAD) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html"

# Installs in place, without network, into the Python that already has torch for this machine's GPU; where the CUDA
# extension does not build, without it: time on a GPU is better spent on all the rest than on nothing. WHEELS=folder is
# installed first: what that Python lacks. DFKD_FAST_INSTALLED=1: all is, by an earlier call.
gpu:  ## OUT=folder BUDGET=seconds: tests and measurements that need a GPU, until the budget is spent
	@test -z "$${DFKD_FAST_INSTALLED:-}" || exit 0; export PIP_BREAK_SYSTEM_PACKAGES=1; \
		install="$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index"; \
		for wheel in $(if $(WHEELS),'$(WHEELS)'/*.whl); do $$install "$$wheel"; done; \
		$$install --editable . || DFKD_FAST_CUDA=0 $$install --editable .
	@$(PYTHON) -m dfkd_fast.benchmarks.gpu --out '$(OUT)' --budget $(BUDGET)

# What such a machine may lack; each without what it depends on, which torch's company has already.
OFFLINE := docstring-parser jsonargparse lightly liger-kernel nvtx pytorch-metric-learning torchdistill typeshed-client
FOR ?= 3.12

wheels: $(STAMP)  ## FOR=3.12: download into out/wheels what `make gpu WHEELS=out/wheels` installs without network
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version $(FOR) \
		--constraint constraints.txt --dest out/wheels $(OFFLINE)
	@ls out/wheels

kernels: $(STAMP)  ## compile every kernel for every architecture, without a GPU; Triton's into kernels/compiled.json
	@$(ONE_THREAD) $(BIN)/python -m dfkd_fast.benchmarks.compile_kernels --write --workers $$(nproc)
	@$(BIN)/python -m dfkd_fast.benchmarks.compile_cuda

report: $(STAMP)  ## write the tables of docs/ from benchmarks/results/
	@$(BIN)/python -m dfkd_fast.benchmarks.report

clean:  ## remove builds and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
