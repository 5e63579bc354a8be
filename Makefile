# Two commands on a fresh machine:
#   make search   sets up .venv and finds a dilation pattern for ResNet-50 (minutes on 2 cores)
#   make test     sets up the rest and runs linters and tests
# Variables: PYTHON (interpreter of the new environment), VENV (its folder), ARGS (passed on).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: search test lint clean

search: $(VENV)/.search-ready
	$(BIN)/python tools/search.py --kernel 9 --resume $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.search-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): PyTorch is large, the first time takes some minutes"
	$(PIP) --editable .
	@touch $@

$(VENV)/.test-ready: $(VENV)/.search-ready
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
