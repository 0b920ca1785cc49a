# `make demo` and `make test` are all that a fresh machine needs; both make .venv first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test static lint format bench clean

demo: $(VENV)/ready
	$(BIN)/lsg-attn demo

test: lint
	$(BIN)/python -m pytest
	$(BIN)/python -m ttsem.sanitize pytest tests/kernels
	$(BIN)/python -m bench.static --subset quick --target sm_90

static: $(VENV)/ready
	$(BIN)/python -m bench.static --json bench/results/static.json

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/ready
	$(BIN)/python -m bench.cpu

$(VENV)/ready: Makefile setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# It asks for Python 3.12 and newer torch; it runs on 3.11 and what is pinned here.
	$(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
