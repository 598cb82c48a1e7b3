# Everything on a fresh machine with Python >= 3.11 (and a C++ compiler, for compiled flex on a CPU).
# `make test PY=python3` uses an environment of your own as it is and installs nothing.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup test test-slow test-gpu lint format demo bench clean

help:
	@echo "make setup      create $(VENV) and install (torch first, at its pinned version)"
	@echo "make test       the default tests, under ten minutes on two cores"
	@echo "make demo       what MoBA attention does, on this machine"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff, fixing what it can"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench      the figures of docs/benchmarks"

setup: $(READY)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

test: $(READY)
	$(PY) -m pytest

test-slow: $(READY)
	$(PY) -m pytest -m slow

test-gpu: $(READY)
	$(PY) -m pytest -m gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(READY)
	$(PY) examples/attention.py

bench: $(READY)
	$(PY) -m mobazoo.bench --suite cpu --markdown docs/benchmarks/cpu.md
	$(PY) -m mobazoo.bench --suite decode --markdown docs/benchmarks/decode.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
