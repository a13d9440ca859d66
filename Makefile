# make demo | test | check | docs | site | bench | matrix | lock | format | clean        (GNU make; Linux and macOS)
# Settings: PYTHON=python3.12 (what makes the environment), VENV=.venv, OUT=out, WORKERS=2 (test processes),
# DEMO="--steps 30" (options of the demo). pip reads its own settings (PIP_INDEX_URL, ...) as everywhere.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
WORKERS ?= 2
DEMO ?=
EXTRAS = diffusers,transformers,train,plots,docs,dev

BIN = $(VENV)/bin
READY = $(VENV)/.ready
TORCH = $(shell grep '^torch==' constraints.txt)
# Small models on few cores: a second thread costs more in waiting than it gives, and a busy machine makes it a hundredfold.
ONE_THREAD = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# Threads that wait spin briefly, then sleep: near full speed on an idle machine, and not lost on a busy one.
SPIN = GOMP_SPINCOUNT=20000
OFFLINE = HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.PHONY: help install demo test check docs site types bench matrix lock format clean
.DEFAULT_GOAL := help

help:
	@head -n 3 Makefile | cut -c3-

install: $(READY)

# torch is asked for alone and by its exact version first: a bare `torch` brings gigabytes of CUDA along.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer; this is %s: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $(READY)

demo: $(READY)
	$(OFFLINE) $(SPIN) $(BIN)/attn-plugins demo --out $(OUT) $(DEMO)

test: $(READY)
	$(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --models=docs/models.json

check: $(READY) types docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/matrix.py --check

# Types are checked on the installed layout, where patches, pipelines and configs lie inside the package.
types: $(READY)
	rm -rf .typecheck build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .typecheck .
	rm -rf build
	MYPYPATH=.typecheck $(BIN)/mypy -p attn_plugins

# The documentation as a site, in $(OUT)/site; a page, link or docstring that is missing is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

site: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(READY)
	$(BIN)/python benchmarks/cpu.py

# The tests of all models write which of them passed; README.md and docs/models.md are made of that.
matrix: $(READY)
	EVERY_PAIR=1 $(OFFLINE) $(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q tests/patches --models=docs/models.json --write-models
	$(BIN)/python tools/matrix.py

# Every Triton kernel compiled for every target, without a GPU: minutes.
lock: $(READY)
	$(ONE_THREAD) $(BIN)/python tools/lock.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) .typecheck build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
