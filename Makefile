# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help env quickstart test test-all gpu gpu-tests gpu-bench lint format clean

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

test: env lint  ## the test suite (about 20 minutes on two cores)
	$(BIN)/python -m pytest -m "not full" $(TEST_PROCESSES)

test-all: env lint  ## everything, also what takes hours or a whole corpus
	$(BIN)/python -m pytest $(TEST_PROCESSES)

# Nothing is installed for these: `make env` first, or name an interpreter that has torch and the rest
# (`make gpu GPU_PYTHON=python3`). Most of the tests' time goes into compiling kernels, one at a time in each process.
GPU_PYTHON ?= $(BIN)/python
GPU_PROCESSES ?= -n 8 --dist worksteal
GPU_RESULTS ?= benchmarks/gpu
GPU_DROPOUTS ?= 0.1 0.0
GPU_TESTS := tests/kernels tests/objective tests/run/test_nvml.py tests/train/test_gpu_training.py
gpu:  ## on a machine with an NVIDIA GPU: gpu-tests, then (even if some fail) gpu-bench
	$(MAKE) --keep-going --jobs=1 gpu-tests gpu-bench

gpu-tests: export OMP_NUM_THREADS := 2
gpu-tests:  ## the tests of GPUs
	$(GPU_PYTHON) -m pytest -m "not full" $(GPU_PROCESSES) $(GPU_TESTS)

gpu-bench:  ## the benchmarks of GPUs, into benchmarks/gpu
	mkdir -p $(GPU_RESULTS)
	failed=0; for p in $(GPU_DROPOUTS); do \
	  $(GPU_PYTHON) tools/benchmark_attention.py --tokens 16384 --num-heads 12 --maps 144 --precision bf16 --dropout $$p \
	    --head-dims 64 --seq-lengths 128 512 2048 --output $(GPU_RESULTS)/attention-dropout-$$p.json --overwrite || failed=1; \
	  $(GPU_PYTHON) tools/benchmark_training.py --model base --batch 32 --precision bf16 --dropout $$p \
	    --output $(GPU_RESULTS)/training-base-dropout-$$p.json --overwrite || failed=1; \
	done; exit $$failed

lint: env  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env  ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what `make quickstart` made
	rm -rf quickstart
