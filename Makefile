# Targets people and CI rely on. PYTHON chooses the interpreter; everything else is made in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-long test-failure lint imports types unit bench format ui clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: venv
	$(BIN)/python -m orchestrator.demo

test: lint imports types unit

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

imports: venv
	$(BIN)/lint-imports

types: venv
	$(BIN)/mypy

# Ray's workers have nothing to do with the rest and starve beside it: they come after it, alone.
unit: venv
	$(BIN)/python -m pytest -m "not long and not ray" --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "not long and ray"

# What takes too long for every run: PostgreSQL, clusters of several nodes, everything that kills processes.
test-long: venv
	$(BIN)/python -m pytest -m "(failure or long) and not endings"

# Everything that kills processes, and two hundred searches that end early: two hours on two cores.
# ENDINGS_SEED=N draws other moments.
test-failure: venv
	$(BIN)/python -m pytest -m failure

bench: venv
	$(BIN)/python -m tests.benchmarks

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: venv
	$(BIN)/orchestrator ui

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .orchestrator *.egg-info
