# make train: set up, then train the built-in digits task on a Ray of its own.   make test: set up, then run the tests.   make chaos N=200: kill that often.
VENV := .venv
BENCH := .venv-bench
PYTHON ?= python3
BENCH_ARGS ?=
RAY_VERSIONS ?= 2.54.1 2.60.0
N ?= 200
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: train test test-slow test-ray-versions chaos lint bench clean

train: $(VENV)/installed
	$(BIN)/distnadam train digits --workers 2 --shards 2

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

# What touches Ray, with the oldest and the newest Ray that we say we support; deploy files name its commands. Old Rays leave files to the
# garbage collector, and warn of it.
test-ray-versions: $(RAY_VERSIONS:%=.venv-ray-%/installed)
	set -e; for version in $(RAY_VERSIONS); do \
		echo "Ray $$version"; \
		RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 .venv-ray-$$version/bin/python -m pytest -m "not slow" \
			-W "ignore::pytest.PytestUnraisableExceptionWarning" \
			tests/backends tests/laws tests/training tests/deploy tests/cli/test_running.py; \
	done

chaos: $(VENV)/installed
	$(BIN)/python -m tests.chaos.run --faults $(N) --seed $(SEED)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(BENCH)/installed
	$(BENCH)/bin/python -m benchmarks $(BENCH_ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# The peers are heavy (torch, numba), so they live apart.
$(BENCH)/installed: pyproject.toml constraints.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[bench]"
	touch $@

.venv-ray-%/installed: pyproject.toml constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	grep -v "^ray==" constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(@D)/constraints.txt --editable ".[dev]" "ray==$*"
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) .venv-ray-* build dist *.egg-info
