# Everything from nothing but Python 3.11+ and pip: each target sets up its own .venv first and reuses it when current.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
MODEL ?=

.PHONY: help install demo test test-all bench eval-pocket train-pocket lint clean

help:
	@echo "make demo         draw a picture, ask pocket three questions about it"
	@echo "make test         lint, types and tests (a few minutes on two cores)"
	@echo "make test-all     the long tests too"
	@echo "make bench        every benchmark that needs no accelerator, as one table"
	@echo "make eval-pocket  pocket's accuracy by kind of question (JSON last)"
	@echo "make train-pocket train pocket from nothing"
	@echo "make install      .venv with everything the tests need"

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"minim3 needs Python 3.11 or later, {sys.executable} is {sys.version.split()[0]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# As a path, so that a folder named minim3 beside the program does not hide it.
EDITABLE := --config-settings editable_mode=compat -e

$(VENV)/.core: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo "installing PyTorch and minim3 into $(VENV): a minute, or a few"
	$(PIP) install -c constraints.txt "setuptools>=77" torch numpy
	$(PIP) install -c constraints.txt $(EDITABLE) .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) install -c constraints.txt $(EDITABLE) ".[test]"
	$(PIP) install -c constraints.txt --no-deps nemo-automodel
	@touch $@

$(VENV)/.all: $(VENV)/.test
	$(PIP) install -c constraints.txt $(EDITABLE) ".[cluster]"
	@touch $@

install: $(VENV)/.test

demo: $(VENV)/.core
	@$(BIN)/minim3 demo

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" tests

test-all: lint $(VENV)/.all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

eval-pocket: $(VENV)/.core
	@$(BIN)/python -m minim3.pocket.evaluate $(if $(MODEL),--model $(MODEL))

train-pocket: $(VENV)/.test
	$(BIN)/python -m minim3.pocket.warmup recipes/pocket_config.json runs/pocket-vision
	$(BIN)/minim3 train recipes/pocket_text.yaml
	$(BIN)/minim3 train recipes/pocket_clips.yaml
	$(BIN)/minim3 train recipes/pocket.yaml

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
