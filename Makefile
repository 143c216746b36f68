# make demo: install into .venv and show what compressed caches do. make test: all checks. Both install only once.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint tables clean

demo: $(INSTALLED)
	$(BIN)/kvmosaic demo

test: lint
	$(BIN)/pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the results that README.md and docs/results.md show; some minutes on 2 cores
tables: $(INSTALLED)
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/tables.py

.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvmosaic needs Python 3.11 or newer; say which: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	touch $@

# a C compiler, if there is one, makes the CPU kernels; without it the PyTorch references serve
$(INSTALLED): .venv/torch pyproject.toml setup.py $(wildcard src/kvmosaic/kernels/*.[ch] src/kvmosaic/kernels/*/*.c)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build demo.png
