# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env quickstart test test-all gpu lint format clean

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.installed: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test]'
	# An independent implementation of BLiMP's scores for the tests; its dependencies ask for more than it uses.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps minicons==0.3.39
	touch $@

env: $(VENV)/.installed  ## create .venv with everything in it

quickstart: env  ## corpus, three short runs, evaluation, report: quickstart/report/report.html
	bash examples/quickstart.sh quickstart

# Two processes, file by file, in the order of tests/conftest.py.
TEST_WORKERS ?= 2
TEST_PROCESSES := -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Their numbers are those of CPUs, so GPUs are hidden from them; `make gpu` has the tests that need one.
test test-all: export CUDA_VISIBLE_DEVICES :=
# One thread each: threads that wait for a core that the other process has cost CPU time too.
test test-all: export OMP_NUM_THREADS := 1

test: env lint  ## the test suite (about 14 minutes on two cores)
	$(BIN)/python -m pytest -m "not full" $(TEST_PROCESSES)

test-all: env lint  ## everything, also what takes hours or a whole corpus
	$(BIN)/python -m pytest $(TEST_PROCESSES)

# Nothing is installed for it: `make env` first, or name an interpreter that has torch and the rest
# (`make gpu GPU_PYTHON=python3`). GPU_ARGUMENTS are those of tools/check_gpu.py.
GPU_PYTHON ?= $(BIN)/python
GPU_MINUTES ?= 8
gpu:  ## check and measure a machine with an NVIDIA GPU; again: go on with what is missing
	$(GPU_PYTHON) tools/check_gpu.py --minutes $(GPU_MINUTES) $(GPU_ARGUMENTS)

lint: env  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env  ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what `make quickstart` made
	rm -rf quickstart
