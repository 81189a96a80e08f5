# Each target sets up everything it needs: Python 3.11 or newer, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check bench rendered fmt setup

help:
	@echo "make demo    the whole story, offline, in about a minute"
	@echo "make test    all tests but the slow tier"
	@echo "make check   format, lint, types, import layers"
	@echo "make bench   side by side with plain PyTorch, Ray Tune and scikit-learn, and after kills; hours, on a quiet machine"
	@echo "make rendered   record the objects of k8s/rendered/ anew"
	@echo "make fmt     format the code and mend what a tool can mend"
	@echo "make setup   only create $(VENV)"

demo: $(READY)
	$(BIN)/graftstack demo

test: $(READY)
	$(BIN)/pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m tests.bench.training_speed
	$(BIN)/python -m tests.bench.group_speed
	$(BIN)/python -m tests.bench.sweep_speed
	$(BIN)/python -m tests.bench.killed_sweep
	$(BIN)/python -m tests.bench.stacking_speed
	$(BIN)/python -m tests.bench.stacking_probes
	$(BIN)/python -m tests.bench.meta_speed
	$(BIN)/python -m tests.bench.meta_scaling
	$(BIN)/python -m tests.bench.recovery

rendered: $(READY)
	$(BIN)/python tests/golden/test_rendered_jobs.py

fmt: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(READY)

# Bytecode is compiled here: without it, every Ray worker would compile torch anew at its start.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "graftstack needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
