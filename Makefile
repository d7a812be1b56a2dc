# make train: set up, then train the built-in digits task on a Ray of its own.   make test: set up, then run the tests.   make chaos N=200: kill that often.
VENV := .venv
BENCH := .venv-bench
PYTHON ?= python3
BENCH_ARGS ?=
N ?= 200
SEED ?= 0
BIN := $(VENV)/bin

.PHONY: train test test-slow chaos lint bench clean

train: $(VENV)/installed
	$(BIN)/distnadam train digits --workers 2 --shards 2

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

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

clean:
	rm -rf $(VENV) $(BENCH) build dist *.egg-info
