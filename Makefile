# All targets run in .venv, which the first one creates from PYTHON. `make` without a target lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PY := .venv/bin/python
ANOTHER = Choose a newer Python: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes, each of which would compile longctx anew.
unexport PYTHONDONTWRITEBYTECODE

# The source of Python's standard library: text that is on every machine. Its tests and generated tables are excluded.
STDLIB = $$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
PREPARE = $(PY) -m longctx data prepare "$(STDLIB)" --suffix .py --exclude site-packages --exclude test \
    --exclude encodings --exclude pydoc_data --on-error skip

# With GPUs, one context-parallel rank per GPU; without, two ranks share the CPU.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
RANKS := $(if $(filter-out 0,$(GPUS)),--nproc $(GPUS) parallel.cp=$(GPUS),--nproc 2)

.PHONY: help install quickstart million test test-all test-adapters faults lint format types docs lock tree clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1\t\2/p' Makefile | expand -t 22

install: .venv/installed ## Create .venv with the pinned dependencies, an editable install of longctx and the tools

# pip checks the hash of every file. The lock files are complete, so dependencies are not looked up; wheels only, because
# a build runs what a file contains (DeepSpeed has no wheels).
LOCKED = $(PY) -m pip install --quiet --require-hashes --no-deps --only-binary :all:

.venv/installed: pyproject.toml .ci/requirements/dev.txt .ci/requirements/cuda.txt
	@command -v '$(PYTHON)' >/dev/null || { echo "There is no command $(PYTHON). $(ANOTHER)" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "longctx needs Python 3.11 or later, and $(PYTHON) is $$('$(PYTHON)' -V 2>&1). $(ANOTHER)" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot create virtual environments: its modules venv and ensurepip are missing." >&2; \
	    echo "On Debian and Ubuntu they come with the package python3-venv: apt install python3-venv" >&2; exit 1; }
	@test -x $(PY) || { echo "Creating .venv with $$('$(PYTHON)' -V)"; rm -rf .venv; '$(PYTHON)' -m venv .venv; }
	@echo "Installing .ci/requirements/dev.txt into .venv, hashes checked (takes minutes the first time: torch is large)"
	@$(LOCKED) -r .ci/requirements/dev.txt
	@if $(PY) -m pip show torch | grep '^Requires:.*nvidia' >/dev/null; then $(LOCKED) -r .ci/requirements/cuda.txt; fi
	@# Environments of earlier versions have this distribution under the name longctx too.
	@if $(PY) -m pip show --quiet longctx 2>/dev/null; then $(PY) -m pip uninstall --quiet --yes longctx; fi
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -c 'from longctx.kernels.native import library; [library.load(name) for name in library.FAMILIES]'
	@touch $@

quickstart: .venv/installed ## Train a small hybrid model on Python's source on 2 ranks and plot its curves (minutes)
	@test -f data/stdlib/manifest.json || $(PREPARE) --heldout 0.05 --out data/stdlib
	@$(PY) -m longctx train quickstart $(RANKS)
	@echo "Next: make million (one sequence of 1,048,576 tokens), or verify that N ranks compute the same as one:"
	@echo "  $(PY) -m longctx verify quickstart --shrink"

million: .venv/installed ## Train a few steps on sequences of 1,048,576 tokens on 2 ranks
	@test -f data/million/manifest.json || $(PREPARE) --join folder --out data/million
	@$(PY) -m longctx train million $(RANKS)
	@echo "Next: write your own recipe. See docs/recipes.md for the keys and README.md for clusters."

# Each worker starts its own ranks.
PYTEST = $(PY) -m pytest -n logical --maxprocesses 4 --dist worksteal --progress

test: lint types ## Run all checks and tests: style, imports, types, tests (about 8 minutes on 2 cores)
	@$(PYTEST) --ignore tests/adapters

test-all: lint types ## The same, including slow tests
	@$(PYTEST) --ignore tests/adapters -m 'slow or not slow'

test-adapters: .venv/adapters ## Install DeepSpeed, Megatron-Core, transformers, trackers and an S3 server, and test the adapters (minutes)
	@$(PYTEST) --dist loadfile tests/adapters

faults: .venv/installed ## Break runs in many ways and print what they survive (about an hour on 2 cores; docs/reliability.md)
	@$(PY) -m tests.faults

.venv/adapters: .venv/installed .ci/requirements/adapters.txt
	@echo "Installing DeepSpeed, Megatron-Core, transformers, wandb, MLflow and an S3 server (.ci/requirements/adapters.txt) into .venv, hashes checked"
	@$(LOCKED) --no-binary deepspeed --no-build-isolation -r .ci/requirements/adapters.txt
	@touch $@

lint: .venv/installed tree ## Check style, formatting and the import order of packages
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "The files above differ from ruff's format: make format" >&2; exit 1; }
	@cd build/tree && report=$$(../../.venv/bin/lint-imports --config ../../pyproject.toml --no-logo 2>&1) \
	    || { echo "$$report" >&2; exit 1; }

types: .venv/installed tree ## Check types with mypy
	@cd build/tree && ../../$(PY) -m mypy --config-file ../../pyproject.toml --no-error-summary -p longctx \
	    | sed -E 's#^longctx/(kernels|parallel|moe|recipes|launch)/#\1/#'

docs: .venv/installed ## Regenerate docs/recipes.md, docs/profiles.md and recipes/keys.txt from the code
	@$(PY) -c 'from longctx.recipe.reference import reference; print(reference(), end="")' > docs/recipes.md
	@$(PY) -c 'from longctx.recipe.reference import keys; print(keys(), end="")' > recipes/keys.txt
	@$(PY) -c 'from longctx.launch.cluster.reference import profile_reference; print(profile_reference(), end="")' > docs/profiles.md

lock: .venv/installed ## Regenerate .ci/requirements/*.txt after a change of dependencies
	@$(PY) .ci/lock.py

tree: .venv/installed
	@$(PY) .ci/tree.py build/tree

format: .venv/installed ## Format the code and apply ruff's fixes
	@$(PY) -m ruff check --quiet --fix-only .
	@$(PY) -m ruff format --quiet .

clean: ## Remove caches and build outputs; .venv, data and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
