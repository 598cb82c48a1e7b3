# Everything on a fresh machine with Python >= 3.11 (and a C++ compiler, for flex and the fast path on a CPU).
# `make test PY=python3` uses an environment of your own as it is and installs nothing.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(origin PY), undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.installed
endif
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup test test-slow test-gpu test-oldest lint format demo bench study clean

help:
	@echo "make setup      create $(VENV) and install (torch first, at its pinned version)"
	@echo "make test       the default tests, on up to four cores"
	@echo "make demo       the main job in about five minutes: a small Llama gets MoBA; a page says what came of it"
	@echo "make lint       ruff and mypy"
	@echo "make format     ruff, fixing what it can"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make test-oldest  what touches transformers, with the oldest one that pyproject.toml allows"
	@echo "make bench      the figures of docs/benchmarks"
	@echo "make study      small models with full attention and kinds of MoBA, compared; docs/studies says what for"

setup: $(READY)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[dev]'
	@touch $@

test: $(READY)
	$(PY) -m pytest

test-slow: $(READY)
	$(PY) -m pytest -n0 -m slow

test-gpu: $(READY)
	$(PY) -m pytest -n0 -m gpu

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

demo: $(READY)
	$(PY) -m mobazoo run recipes/quickstart.yaml

# A suite writes its page and then fails where a bound is missed: the others run all the same, one after the other.
bench: $(READY)
	@failed=0; for suite in cpu decode; do \
		$(PY) -m mobazoo bench --suite $$suite --markdown docs/benchmarks/$$suite.md || failed=1; \
	done; exit $$failed

study: $(READY)
	$(PY) -m tools.study cpu

clean:
	rm -rf $(VENV) .oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The oldest release of transformers that pyproject.toml allows, with the tokenizers and Hub client it asks for, in a
# folder of its own before the installed ones.
OLDEST_TRANSFORMERS := 5.10.1

.oldest/$(OLDEST_TRANSFORMERS): $(READY)
	rm -rf .oldest
	$(PY) -m pip install --quiet --disable-pip-version-check --target .oldest transformers==$(OLDEST_TRANSFORMERS)
	@touch $@

test-oldest: .oldest/$(OLDEST_TRANSFORMERS)
	PYTHONPATH=$(CURDIR)/.oldest $(PY) -c "import transformers; assert transformers.__version__ == '$(OLDEST_TRANSFORMERS)'"
	PYTHONPATH=$(CURDIR)/.oldest $(PY) -m pytest tests/integrations tests/models tests/nn tests/checkpoint tests/cli \
		tests/examples tests/test_generate.py tests/test_register.py
