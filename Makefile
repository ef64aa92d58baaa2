# make demo   from nothing to an HTML report: installs, runs the main job on `digits`, reports
# make test   the whole test-suite
# make lint   ruff, mypy, import-linter
# make gpu    what needs a CUDA device, in resumable pieces of under 10 minutes
#
# Variables: PYTHON=python3.12       interpreter that creates .venv
#            NO_VENV=1               use PYTHON as it is and install nothing
#            TORCH_INDEX_URL=URL     look here too for torch and torchvision (CPU-only builds)
#            ARGS='...'              added to the command of `make test` or `make gpu`

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

ifeq ($(NO_VENV),1)
RUN := $(PYTHON)
BIN :=
READY :=
else
RUN := $(VENV)/bin/python
BIN := $(VENV)/bin/
READY := $(VENV)/.ready
endif

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --retries 5 -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint gpu

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'

setup: $(READY)

# torch comes first and alone: with a CPU build in place, nothing later pulls the CUDA one
$(VENV)/.ready: pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"Python 3.11 or newer is needed, this is {v}; set PYTHON=" if sys.version_info < (3, 11) else 0)'
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL)) torch torchvision
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[hub,test,dev]'
	@touch $@

demo: $(READY)
	$(RUN) bench.py train-and-eval --plan a2
	$(RUN) bench.py report
	@echo 'open $(CURDIR)/runs/report.html'

# one torch thread per worker: more would only fight over the cores; who is done takes over tests
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(BIN)lint-imports --no-logo

gpu: $(READY)
	$(RUN) -m robuq_bench.measuring.gpu_suite $(ARGS)
