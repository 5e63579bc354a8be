# Two commands on a fresh machine:
#   make search   sets up .venv and finds a dilation pattern for ResNet-50 (minutes on 2 cores)
#   make test     sets up the rest, `make install-openmmlab` included, and runs linters and tests
# Variables: PYTHON (interpreter of the new environment), VENV (its folder), ARGS (passed on).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: search test lint install-openmmlab clean

search: $(VENV)/.search-ready
	$(BIN)/python tools/search.py --kernel 9 --resume $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

install-openmmlab: $(VENV)/.openmmlab-ready

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

# MMCV and xtcocotools are compiled against the PyTorch and NumPy in the environment; -g0 halves MMCV's time.
# A wheel of MMCV that PIP_FIND_LINKS offers is taken instead. MMCV wants opencv-python and the search the headless
# one, in the same folder: the one without need of a display must be written last.
$(VENV)/.openmmlab-ready: $(VENV)/.search-ready
	@echo '#include <Python.h>' | $${CXX:-c++} -std=c++17 -fsyntax-only -x c++ - \
	  -I "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" || { \
	  echo "OpenMMLab's libraries are compiled here: install a C++17 compiler and Python's headers" \
	    "(apt-get install g++ python3-dev), or set CXX and PYTHON" >&2; exit 1; }
	@echo "installing OpenMMLab's libraries: MMCV is compiled unless PIP_FIND_LINKS has a wheel, some 10 minutes"
	$(PIP) setuptools wheel cython ninja psutil packaging
	CFLAGS=-g0 MMCV_WITH_OPS=1 $(PIP) --no-build-isolation --no-binary xtcocotools --editable ".[openmmlab]"
	$(PIP) --force-reinstall --no-deps opencv-python-headless
	@touch $@

$(VENV)/.test-ready: $(VENV)/.openmmlab-ready
	$(PIP) --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
