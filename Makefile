# `make demo` and `make test` need nothing but git, make and python3 with venv: they make .venv themselves.
PYTHON ?= python3
CONFIG ?= configs/vp_digits.py
WORKDIR ?= runs/vp_digits
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test lint bench

help:
	@echo "make demo    set up .venv, train on handwritten digits, sample, evaluate bits/dim (PYTHON=python3.12 picks an interpreter)"
	@echo "make test    set up .venv if need be and run the tests (JOBS=$(JOBS) at a time; the slow ones: $(BIN)/pytest -m slow)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   measure training, sampling and likelihood (CONFIG=$(CONFIG))"

demo: $(VENV)/.installed
	@$(BIN)/python main.py --config $(CONFIG) --mode demo --workdir $(WORKDIR)

# One thread per process: the tests' tensors are small, and the processes run side by side.
test: $(VENV)/.installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@echo "lint: nothing to complain about"

bench: $(VENV)/.installed
	@$(BIN)/python -m benchmarks --config $(CONFIG)

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and the rest of constraints.txt, several minutes when they must be downloaded"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
	@echo "$(VENV) is ready"
