# make sweep   a certified dispatch table for this machine, from nothing
# make test    every test and lint, from nothing
PYTHON ?= python3
BIN := .venv/bin
INTERPRETER_TRITON := triton==3.6.0 # fits torch 2.13 without CUDA; CUDA builds of torch bring their own

.PHONY: .venv sweep test lint clean

.venv: .venv/installed

# The stamps are written last: an interrupted install is taken up again.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch .venv/installed

.venv/dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev $(INTERPRETER_TRITON)
	touch .venv/dev

sweep: .venv/installed
	$(BIN)/nsa-tune sweep

test: .venv/dev lint
	$(BIN)/python -m pytest -n 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf .venv build dist
