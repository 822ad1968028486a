# vllm-ext: make demo | make test | make help
#
# PYTHON  the interpreter that makes the environment (3.11 or newer)     make PYTHON=python3.12 install
# VENV    where the environment lies                                     make VENV=/somewhere/venv test
# ARGS    more arguments for the command of the target                   make test ARGS="-k quest"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types bench docs wheel clean distclean

BIN := $(VENV)/bin
LOCK := requirements-cpu.lock
# a changed lock or pyproject has another stamp, so the environment is brought up to date once and then left alone
STAMP := $(VENV)/.vllm-ext-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d' ' -f1)

help:  ## this text
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make the environment: pinned packages, this package (editable)

$(STAMP): | $(BIN)/python
	@echo "== installing the pinned packages into $(VENV) (once)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -r $(LOCK)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -m vllm_ext.stub
	@$(BIN)/python -c 'import torch' || { echo "torch does not import: the lock means PyTorch's CPU build, see the head of $(LOCK)." >&2; exit 1; }
	@rm -f $(VENV)/.vllm-ext-*
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "vllm-ext needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -1); use make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "== making the environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

demo: install  ## serve SmolLM2 with and without Quest and compare the answers
	$(BIN)/vllm-ext demo $(ARGS)

test: install  ## the whole test-suite (GPU tests are skipped without CUDA)
	@bash tests/run.sh $(BIN)/python $(ARGS)

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The folders import as vllm_ext.*, which mypy cannot see in the tree: it checks the package as it is installed.
types: install  ## mypy on the package
	@rm -rf build/mypy build/lib
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --target build/mypy .
	cd build/mypy && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache vllm_ext

bench: install  ## kernel benchmarks of this machine
	$(BIN)/vllm-ext bench kernels $(ARGS)

docs: install  ## the generated parts of README.md and docs/
	$(BIN)/python -m vllm_ext.docs

wheel: install  ## dist/vllm_ext-*.whl
	@rm -rf build/lib
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## what builds and tests leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and the environment
	rm -rf $(VENV)
