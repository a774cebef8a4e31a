# Everything runs in .venv, made from PYTHON by the first target that needs it. `make` alone lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PY := .venv/bin/python
ANOTHER = Name a newer Python: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install test test-all lint format types tree clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)$$/  make \1\t\2/p' Makefile | expand -t 20

install: .venv/installed ## Make .venv: the pinned dependencies, longctx as an editable install, the tools

.venv/installed: pyproject.toml constraints.txt
	@command -v '$(PYTHON)' >/dev/null || { echo "There is no command $(PYTHON). $(ANOTHER)" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "longctx needs Python 3.11 or later, and $(PYTHON) is $$('$(PYTHON)' -V 2>&1). $(ANOTHER)" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments: its modules venv and ensurepip are missing." >&2; \
	    echo "On Debian and Ubuntu they come with the package python3-venv: apt install python3-venv" >&2; exit 1; }
	@test -x $(PY) || { echo "Making .venv with $$('$(PYTHON)' -V)"; rm -rf .venv; '$(PYTHON)' -m venv .venv; }
	@echo "Installing what constraints.txt pins into .venv (minutes the first time: torch is large)"
	@$(PY) -m pip install --quiet -c constraints.txt setuptools
	@$(PY) -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

test: lint types ## Check all: style, layers, types, and the tests (under 10 minutes on 2 cores)
	@$(PY) -m pytest

test-all: lint types ## The same with the slow grids
	@$(PY) -m pytest -m 'slow or not slow'

lint: .venv/installed tree ## Check style, format, and which folder imports which
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "The files above differ from ruff's format: make format" >&2; exit 1; }
	@cd build/tree && report=$$(../../.venv/bin/lint-imports --config ../../pyproject.toml --no-logo 2>&1) \
	    || { echo "$$report" >&2; exit 1; }

types: .venv/installed tree ## Check the types with mypy
	@cd build/tree && ../../$(PY) -m mypy --config-file ../../pyproject.toml --no-error-summary -p longctx \
	    | sed -E 's#^longctx/(kernels|parallel|moe|recipes|launch)/#\1/#'

tree: .venv/installed
	@$(PY) .ci/tree.py build/tree

format: .venv/installed ## Format the code and mend what ruff can mend
	@$(PY) -m ruff check --quiet --fix-only .
	@$(PY) -m ruff format --quiet .

clean: ## Remove what the tools wrote; .venv, data and runs stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
