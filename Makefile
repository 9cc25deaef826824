# All targets except `gpu` run in .venv, which is created from pyproject.toml and constraints.txt.
#   PYTHON=python3.12   the interpreter for .venv; `gpu` uses it directly
#   WORKERS=4           number of test processes

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
WORKERS ?= auto
OUT ?= out/gpu
CALL ?= 1

# uv installs several times faster than pip; pip is used if uv cannot be installed or fails. uv does not read pip's
# settings, so the index and the certificates are passed on. Like pip, it compiles to bytecode: with
# PYTHONDONTWRITEBYTECODE, as in many containers, each process would otherwise compile PyTorch again.
define INSTALL
install() { \
	local index="$${PIP_INDEX_URL:-$$($(BIN)/pip config get global.index-url 2>/dev/null || true)}"; \
	export SSL_CERT_FILE="$${SSL_CERT_FILE:-$${PIP_CERT:-}}"; [ "$$SSL_CERT_FILE" ] || unset SSL_CERT_FILE; \
	{ $(BIN)/pip install --quiet --constraint constraints.txt uv \
		&& UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${index:-https://pypi.org/simple}}" \
			$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt "$$@"; } \
	|| $(BIN)/pip install --quiet --constraint constraints.txt "$$@"; \
}; \
progress() { \
	local log=$(VENV)/install.log start=$$SECONDS task="$$1" pid; shift; \
	"$$@" > $$log 2>&1 & pid=$$!; \
	while kill -0 $$pid 2>/dev/null; do \
		[ ! -t 1 ] || printf '\r%s: %d s ' "$$task" $$((SECONDS - start)); \
		sleep 0.5; \
	done; \
	wait $$pid || { echo; cat $$log; exit 1; }; \
	[ ! -t 1 ] || printf '\r'; \
	echo "$$task: done in $$((SECONDS - start)) s"; \
}
endef
# One thread per test process: results do not depend on the number of cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --maxprocesses 8

.PHONY: help demo test test-all check lint format docs gpu reliability offline-wheels wheels kernels report clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /  make \1|/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST)

$(RUNTIME): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 || true)" >&2; \
		echo "Choose another one with PYTHON=..., for example: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks the venv module (Debian, Ubuntu: the package python3-venv)" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(INSTALL); DFKD_FAST_CUDA=0 progress 'Installing into $(VENV)' install --editable '.[report]'
	@touch $@

# The tools for development, and the CUDA extension if there is an nvcc.
$(STAMP): $(RUNTIME)
	@$(INSTALL); progress 'Installing the development tools' install setuptools wheel cmake ninja pybind11 torch
	@$(INSTALL); progress 'Building the package' install --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(RUNTIME)  ## train a teacher, distill it and evaluate the student, on two small data sets
	@$(BIN)/dfkd-fast demo

test: $(STAMP)  ## run the tests, except slow ones
	@$(PYTEST)

test-all: $(STAMP)  ## run all tests, with long sweeps and the wheel
	@$(PYTEST) -m ""

MINUTES ?= 30
JOBS ?= 1

reliability: $(STAMP)  ## inject faults and fuzz inputs: TARGET='kill ...', MINUTES=30 per target, SEED=0, JOBS=1
	@$(BIN)/python -m tests.reliability $(TARGET) --minutes $(MINUTES) --jobs $(JOBS) --seed $(or $(SEED),0) \
		--out benchmarks/results/cpu/reliability.json

# Test files that take seconds, from every folder.
CHECKS := test_architecture benchmarks/test_results compat/test_compat_losses cuda/test_launches data/test_data_loading \
	docs/test_contributing docs/test_report engine/test_config engine/test_steps kernels/test_max_pool2x2_kernels \
	models/test_nn models/test_objectives ops/test_backend ops/test_choices ops/test_testing

check: lint  ## lint, and fast tests of every folder
	@$(PYTEST) -q -k "not large_memory" $(CHECKS:%=tests/%.py)

# Words with a plainer alternative: only, next to, needed or expected, similarly, because, ... A line that needs one
# contains `allow-word`.
WORDS := alone|beside|wanted|likewise|told|nobody|made ready|handed over|of its own

lint: $(STAMP)  ## ruff, mypy, and words to avoid
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@! git grep -nIiwE '$(WORDS)' -- '*.py' '*.md' '*.cu' '*.cpp' '*.h' '*.yaml' '*.yml' '*.toml' | grep -v allow-word || { echo 'Use plainer words (WORDS in Makefile).' >&2; exit 1; }

format: $(STAMP)  ## apply ruff's fixes and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP)  ## build the documentation site in out/site
	@$(ONE_THREAD) NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "out/site/index.html"

# Installs this checkout, without network, into the Python that has torch for this GPU, and without the CUDA extension,
# which call 2 builds while other jobs run. WHEELS=folder: wheels to install first.
gpu:  ## check and measure on a GPU: the jobs of benchmarks/plan.py, CALL=1 or 2, OUT=folder
	@export PIP_BREAK_SYSTEM_PACKAGES=1 DFKD_FAST_CUDA=0; \
		install="$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --no-index"; \
		for wheel in $(if $(WHEELS),'$(WHEELS)'/*.whl); do $$install "$$wheel"; done; $$install --editable .
	@$(PYTHON) -m dfkd_fast.benchmarks.plan --call $(CALL) --out '$(OUT)'

# Packages that such a machine may lack; their dependencies are installed there.
OFFLINE := docstring-parser jsonargparse lightly liger-kernel nvtx pytorch-metric-learning torchdistill typeshed-client
FOR ?= 3.12

offline-wheels: $(STAMP)  ## download the wheels for `make gpu WHEELS=out/wheels`, FOR=3.12
	@$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version $(FOR) \
		--constraint constraints.txt --dest out/wheels $(OFFLINE)
	@ls out/wheels

DIST ?= dist

wheels: $(STAMP)  ## build the files for PyPI in dist/: sdist, pure wheel and, if there is an nvcc, a CUDA wheel
	@rm -rf build/cuda build/lib* '$(DIST)'/dfkd_fast-*
	@$(INSTALL); progress 'Building the sdist and the pure wheel' \
		env DFKD_FAST_CUDA=0 $(BIN)/python -m build --no-isolation --outdir '$(DIST)'
	@$(INSTALL); progress 'Building the CUDA wheel' $(BIN)/python -m build --no-isolation --wheel --outdir build/cuda
	@$(INSTALL); if [ -e build/cuda/*-linux_*.whl ]; then \
		PATH="$(abspath $(BIN)):$$PATH" progress 'Finding its platform tag' auditwheel repair \
			--exclude libtorch_cpu.so --exclude libtorch_cuda.so --wheel-dir '$(DIST)' build/cuda/*.whl; \
	else \
		grep 'without its CUDA extension' $(VENV)/install.log; \
	fi
	@ls '$(DIST)'

kernels: $(STAMP)  ## compile all kernels for all architectures and print their resources (no GPU needed)
	@$(ONE_THREAD) $(BIN)/python -m dfkd_fast.benchmarks.ops.compile_kernels --workers $$(nproc)
	@$(BIN)/python -m dfkd_fast.benchmarks.ops.compile_cuda

report: $(STAMP)  ## write the tables of README and docs/ from benchmarks/results/
	@$(BIN)/python -m dfkd_fast.benchmarks.report

clean:  ## remove builds and caches, but not .venv and runs/
	rm -rf build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
