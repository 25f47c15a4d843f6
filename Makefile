# Everything runs from .venv, which is made on first use and follows the lock files from then on.
# Needs python3 (3.11 or newer), make and a package index that pip can reach; nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Workers that `make start-workers` adds.
N ?= 3
# What pytest gets, e.g. make test TESTS="tests/unit -k staging".
TESTS ?= tests
# Test processes; a file's tests stay in one of them, so that they share its stack. JOBS=0: all in this process.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Wheels only: what a source archive needs to be built would not be locked.
PIP_INSTALL := $(PIP) install --quiet --no-deps --require-hashes --only-binary :all:

# ── what you run ──────────────────────────────────────────────────────────────────────────────────
# `exec` puts the command in the shell's place, so that Ctrl-C and SIGTERM reach it and not a shell before it.

.PHONY: run-distributed up down deploy-flows start-workers test test-prefect-range lint format lock clean help

run-distributed: .venv/installed ## run the whole ETL on the example database: server, workers, report
	@exec $(PY) -m phasewise run-distributed

up: .venv/installed ## start a stack that stays: Prefect server with UI, work pool, workers
	@exec $(PY) -m phasewise up

down: .venv/installed ## stop the stack that `make up` started
	@exec $(PY) -m phasewise down

deploy-flows: .venv/installed ## deploy the seven flows to the running stack
	@exec $(PY) -m phasewise deploy

start-workers: .venv/installed ## add N workers to the running stack (N=3)
	@exec $(PY) -m phasewise start-workers $(N)

test: .venv/installed-dev ## run all tests (TESTS="tests/unit -k name" for some)
	@exec $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile $(TESTS)

# The oldest Prefect that pyproject.toml allows and the newest there is, which are one and the same by now. With
# TESTED=locked the locked one is left out, for `make test` has run with it.
PREFECT_RANGE := 3.9.1
PREFECT_TESTS := tests/unit/patches tests/unit/server tests/unit/worker/test_worker.py tests/unit/worker/test_event_relay.py \
	tests/unit/local tests/integration/test_server_schema.py tests/integration/test_worker.py \
	tests/integration/test_flow_runs_contract.py tests/integration/test_schedules.py tests/integration/test_newer_prefect.py
# Tests among them of what is ours alone, two fifths of their time: limits of memory, forkservers that are replaced.
PREFECT_SKIPS := memory or forkserver or code_of_now or start_soon

test-prefect-range: .venv/installed-dev ## run the tests of patches, worker, server and schedules with the oldest and the newest Prefect
	@pids=(); locked=$$($(PY) -c 'from importlib.metadata import version; print(version("prefect"))'); \
	for version in $(PREFECT_RANGE); do \
	  [ "$(TESTED)" != locked ] || [ $$version != $$locked ] || continue; \
	  $(MAKE) --no-print-directory .venv/prefect-$$version/installed; \
	  .venv/prefect-$$version/bin/python -m pytest $(PREFECT_TESTS) -k 'not ($(PREFECT_SKIPS))' >.venv/prefect-$$version/tests.log 2>&1 & pids+=($$!); \
	done; \
	status=0; for pid in $${pids[@]}; do wait $$pid || status=1; done; \
	for version in $(PREFECT_RANGE); do echo "Prefect $$version:"; cat .venv/prefect-$$version/tests.log 2>/dev/null || true; done; \
	exit $$status

lint: .venv/installed-dev ## check style, types, import rules and declared dependencies
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	.venv/bin/lint-imports
	.venv/bin/deptry .
	.venv/bin/deptry tests --exclude tests/data --ignore DEP002,DEP004

format: .venv/installed-dev ## format the code and fix what ruff can fix
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

# ── the environment ───────────────────────────────────────────────────────────────────────────────

COMPILE = .venv/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(LOCK_FLAGS) pyproject.toml --group build

lock: .venv/installed-dev ## resolve pyproject.toml again and write the lock files (LOCK_FLAGS=--upgrade for newer versions)
	$(COMPILE) --extra example --extra dev --output-file requirements-dev.lock
	$(COMPILE) --extra example --constraint requirements-dev.lock --output-file requirements.lock

# A .venv whose Python has gone (an upgrade of the system) is made anew, stamps or not.
ifneq ($(shell test -x $(PY) && echo yes),yes)
.PHONY: .venv/installed .venv/installed-dev
endif

# requirements-dev.lock holds all of requirements.lock, so either order of the two ends in the same versions.
.venv/installed: requirements.lock pyproject.toml | $(PY)
	@echo "Installing the locked requirements into .venv (once; a minute or so)..."
	@$(PIP_INSTALL) -r requirements.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: requirements-dev.lock .venv/installed
	@echo "Installing the locked development tools into .venv..."
	@$(PIP_INSTALL) -r requirements-dev.lock
	@touch $@

# Hard links to the packages of .venv, then another Prefect in the place of theirs: pip removes a link before it writes.
.venv/prefect-%/installed: .venv/installed-dev
	@rm -rf $(@D)
	@$(PY) -m venv --without-pip $(@D)
	@cp -al .venv/lib/python3*/site-packages/. $(@D)/lib/python3*/site-packages/
	@$(PIP) --python $(@D)/bin/python install --quiet --only-binary :all: 'prefect==$*'
	@touch $@

# The first of these that is 3.11 or newer; set PYTHON to take another.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p $(IS_NEW_ENOUGH) 2>/dev/null; then echo $$p; break; fi; done)

$(PY):
	@if ! $(or $(PYTHON),false) $(IS_NEW_ENOUGH) 2>/dev/null; then \
	  found=$$($(or $(PYTHON),python3) --version 2>&1) || found=none; \
	  echo "phasewise needs Python 3.11 or newer; found: $$found." >&2; \
	  echo "Install one and name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; fi
	@echo "Making .venv with $$($(PYTHON) --version)..."
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }

clean: ## stop the stack, remove .venv and what tools cached; the warehouse stays
	@if [ -x .venv/bin/phasewise ]; then $(PY) -m phasewise down || true; fi
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage htmlcov dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@echo "make <target>:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-19s %s\n", $$1, $$2 }' Makefile
