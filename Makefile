# Everything a person or a build server runs. `make` alone prints this list.
#
# Set-up is done once: the stamps in the environment are older than pyproject.toml and
# constraints.txt only when something has to be installed again.

VENV   ?= .venv
PYTHON ?= $(firstword $(shell command -v python3.11 python3 python 2>/dev/null) python3)
# More arguments for pip, for example another index: make install PIP_ARGS="--index-url URL"
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN  := $(VENV)/bin
CODE := sparqle_stream kernels training deploy examples $(if $(wildcard bench/*.py),bench) tests
# mypy reads packages, tests are left to ruff and pytest
TYPED := sparqle_stream kernels/sparqle_kernels training deploy examples $(if $(wildcard bench/*.py),bench)

# The pins hold in every pip call, also inside its builds: an unpinned torch is gigabytes of CUDA.
PIP_INSTALL = PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
  $(BIN)/python -m pip install $(PIP_ARGS)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test install fmt check lint types pull pytest bench build lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## live captions of a bundled clip, from nothing
	$(BIN)/sparqle-stream models pull
	$(BIN)/sparqle-stream demo

test: check pull pytest ## set-up, format, lint, types, tests

install: $(VENV)/.installed-dev ## environment with everything that developing needs

fmt: $(VENV)/.installed-dev ## format the code, sort the imports
	$(BIN)/ruff check --fix --select I,RUF100 $(CODE)
	$(BIN)/ruff format $(CODE)

check: lint types ## formatting, lint and types; changes nothing

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types: $(VENV)/.installed-dev
	$(BIN)/mypy $(TYPED)

# Tests that need the LLM skip with a reason where it cannot be fetched.
pull: $(VENV)/.installed-dev
	$(BIN)/sparqle-stream models pull || echo "make: no LLM here; tests that need it will skip"

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Nothing is timed on a busy machine, unless: make bench BENCH_ARGS=--force
bench: $(VENV)/.installed-dev ## accuracy, latency, start, flips, throughput, soak into bench/results; the page of them
	$(BIN)/sparqle-stream models pull
	set -e; for bench in accuracy latency start flips throughput soak; do \
	  $(BIN)/python -m bench.$$bench $(BENCH_ARGS) --output bench/results/$$bench.json; \
	done
	$(BIN)/python -m bench.compare $(BENCH_ARGS) --output bench/results/compare.json
	$(BIN)/python -m bench.report

build: $(VENV)/.installed-dev ## wheel and source archive into dist/
	$(BIN)/python -m build --no-isolation --outdir dist .

lock: ## write constraints.txt anew from the newest versions (torch stays)
	rm -rf build/lock && mkdir -p build/lock
	grep '^torch==' constraints.txt > build/lock/torch.txt
	$(PYTHON) -m venv build/lock/venv
	PIP_CONSTRAINT=build/lock/torch.txt build/lock/venv/bin/python -m pip install \
	  $(PIP_ARGS) -e '.[dev]'
	{ grep '^#' constraints.txt; build/lock/venv/bin/python -m pip freeze --all --exclude-editable \
	  | sed -e 's/^\(torch==[0-9.]*\)+.*/\1/' -e '/^pip==/d' -e '/^wheel==/d'; } > build/lock/constraints.txt
	mv build/lock/constraints.txt constraints.txt && rm -rf build/lock

clean: ## remove the environment, caches and builds
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up ---------------------------------------------------------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is too old or missing; install Python 3.11, or name another: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed $@
