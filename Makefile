# Every verb of the project, the same on a laptop and in .ci/run. `make help` lists them.
VENV := .venv
INTEROP := .venv-interop
BENCH := .venv-bench
PYTHON ?= python3
BENCH_ARGS ?=
RAY_VERSIONS ?= 2.54.1 2.60.0
N ?= 200
SEED ?= 0
HOURS ?= 1
# Processes that run tests side by side, each with a Ray of its own: one more than cores, since a
# test often waits for processes that start; no more than 8.
JOBS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores + 1 : 8)))
COV ?=

# Each test on Ray starts processes, which should find their modules compiled, as a user's do.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --constraint
PYTEST_OPTIONS := --numprocesses $(JOBS)
# One takes chaos and hosts, which mostly wait, and the other the rest.
SLOW_OPTIONS := --numprocesses 2
AGAIN := -m pytest --last-failed --last-failed-no-failures none
COVERAGE_OPTIONS := $(if $(COV),--cov --cov-report=term:skip-covered)

.DEFAULT_GOAL := help
.PHONY: help train test test-again slow slow-again nightly test-ray-versions coverage lint format types wheel chaos soak bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(VENV)/installed ## set up, then train the built-in digits task on a Ray of its own
	$(BIN)/distnadam train digits --workers 2 --shards 2

test: $(VENV)/installed ## set up, then run all tests but the slow ones; COV=1 also measures coverage
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_OPTIONS) $(COVERAGE_OPTIONS)

slow: $(INTEROP)/installed ## the slow tests: other frameworks, chaos, several hosts (needs root)
	$(INTEROP)/bin/python -m pytest -m "slow and not nightly" $(SLOW_OPTIONS)

test-again: $(VENV)/installed ## what failed of them, one test after the other
	$(BIN)/python $(AGAIN)

slow-again: $(INTEROP)/installed ## what failed of the slow ones, one test after the other
	$(INTEROP)/bin/python $(AGAIN)

nightly: $(INTEROP)/installed ## what repeats slow tests in a costlier form; each night, not in .ci/run
	$(INTEROP)/bin/python -m pytest -m nightly $(SLOW_OPTIONS)

# What touches Ray, with the oldest and the newest Ray that we say we support; deploy files name its
# commands. Old Rays leave files to the garbage collector, and warn of it.
test-ray-versions: $(RAY_VERSIONS:%=.venv-ray-%/installed) ## what touches Ray, with the oldest and the newest Ray
	set -e; for version in $(RAY_VERSIONS); do \
		echo "Ray $$version"; \
		RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 .venv-ray-$$version/bin/python -m pytest -m "not slow" \
			$(PYTEST_OPTIONS) -W "ignore::pytest.PytestUnraisableExceptionWarning" \
			tests/backends tests/laws tests/training tests/deploy tests/cli/test_running.py; \
	done

coverage: ## what the tests of make test cover, with a floor
	$(MAKE) test COV=1

lint: $(VENV)/installed types ## check style and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed ## check types
	$(BIN)/mypy

format: $(VENV)/installed ## put the code in the house's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/installed ## build the wheel, and try it in an environment of its own
	rm -rf build/wheel build/fresh
	$(BIN)/python -m build --wheel --outdir build/wheel .
	$(PYTHON) -m venv build/fresh
	build/fresh/bin/python $(PIP_INSTALL) constraints.txt build/wheel/*.whl
	cd build && fresh/bin/python -c "from distnadam import *; import sys; assert 'ray' not in sys.modules"
	cd build && fresh/bin/distnadam doctor --json

chaos: $(VENV)/installed ## kill processes N=200 times, and compare every bit; SEED=0
	$(BIN)/python -m tests.chaos.run --faults $(N) --seed $(SEED)

soak: $(VENV)/installed ## train on three hosts for HOURS=1 amid faults, saves, reshards and drains (needs root)
	$(BIN)/python -m tests.hosts.soak --hours $(HOURS) --seed $(SEED)

bench: $(BENCH)/installed ## measure beside peers; BENCH_ARGS="..."
	$(BENCH)/bin/python -m benchmarks $(BENCH_ARGS)

clean: ## remove environments and build outputs
	rm -rf $(VENV) $(INTEROP) $(BENCH) .venv-ray-* build dist *.egg-info .coverage .coverage.*

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV), once: 1 to 2 minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) constraints.txt --editable ".[dev]"
	touch $@

# The frameworks that checkpoints go to and come from.
$(INTEROP)/installed: pyproject.toml constraints.txt
	test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/python $(PIP_INSTALL) constraints.txt --no-compile --editable ".[dev,interop]"
	touch $@

# The peers are heavy (torch, numba), so they live apart.
$(BENCH)/installed: pyproject.toml constraints.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python $(PIP_INSTALL) constraints.txt --editable ".[bench]"
	touch $@

.venv-ray-%/installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -v "^ray==" constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python $(PIP_INSTALL) $(@D)/constraints.txt --editable ".[dev]" "ray==$*"
	touch $@
