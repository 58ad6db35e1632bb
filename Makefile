# make serve: install and serve the built-in model.  make test: install and check everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: serve test test-slow lint clean

$(BIN)/python:
	@echo "== creating $(VENV)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Quire needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "== installing Quire and what it needs (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "== installing Quire and what its tests need (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(VENV)/.installed $@

serve: $(VENV)/.installed
	@echo "== serving the built-in model; end with Ctrl-C"
	$(BIN)/quire serve

lint: $(VENV)/.installed-test
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== mypy"
	$(BIN)/mypy

test: lint
	@echo "== tests"
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed-test
	@echo "== the slow tests"
	$(BIN)/python -m pytest -q -m 'slow and not gpu' --timeout 1200

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
