# make quickstart | test | lint | setup: each builds .venv by itself. On an NGC image: make test SYSTEM_PACKAGES=1
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup quickstart test lint clean help

help:
	@sed -n 1p Makefile

setup: $(VENV)/.ready

# torch first and by itself: asked for by another package, the newest build with gigabytes of CUDA would be taken.
# With SYSTEM_PACKAGES=1 the torch, Transformer Engine and apex of an NGC image are used and left as they are.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "error: PYTHON=$(PYTHON): is Python %d.%d; give Python 3.10 or newer, PYTHON=python3.11" % v[:2])'
ifdef SYSTEM_PACKAGES
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip freeze | grep -E '^(torch|numpy)==' > $(VENV)/image.txt || true
	$(BIN)/python -m pip install --quiet -c $(VENV)/image.txt -e '.[test,lint]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
endif
	touch $@

quickstart: setup
	$(BIN)/python -W ignore recipes/quickstart.py

test: setup
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache
