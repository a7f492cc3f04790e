# make demo | test | test-fast | soak | lint | docs | bench: each sets up what it needs, once, in .venv
# make test-cuda-build | test-triton: checks of the CUDA paths that need no GPU, in environments of their own
# On a machine with a GPU: make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_CUDA ?= torch==2.14.1
JOBS ?= 2

BIN := .venv/bin
# Each worker begins with a part of its own, so that few fixtures are made by both.
PYTEST = TEST_PACKAGES_REQUIRED=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal
READY := .venv/ready
# TORCH is named in every installation, so that no extra can replace the build that was asked for.
INSTALL = $(BIN)/pip install -qq --disable-pip-version-check "$(TORCH)" --editable

.PHONY: demo test test-fast test-cuda-build test-triton soak lint docs bench bench-ops clean
.NOTPARALLEL:

demo: $(READY)/base
	$(BIN)/vlmr1 demo

test: lint $(READY)/test
	$(PYTEST)

test-fast: $(READY)/test
	$(PYTEST) -m "not slow"

# Launches on a stub of the driver, and steps on CUDA tensors without data. Takes 6 GB of disk; CI does not run it.
test-cuda-build: .venv-cuda/ready
	PYTHONPATH=.:kernels OMP_NUM_THREADS=1 .venv-cuda/bin/python -m pytest --confcutdir=tests/cuda_build tests/cuda_build
	.venv-cuda/bin/python -m tests.helpers.cuda_table

# The compile tests with several releases of Triton. Takes 3 GB of disk; CI does not run it.
test-triton: $(READY)/test
	PYTHONPATH=.:kernels $(BIN)/python -m tests.helpers.triton_versions
	$(BIN)/python -m tests.helpers.cuda_table

# Runs that are killed at many more moments than in `make test`.
soak: $(READY)/test
	$(PYTEST) -m soak

# The bounds on the structure are in tests/structure.py; pyright reads the packages that tests and benchmarks import.
lint: $(READY)/lint $(READY)/test $(READY)/bench docs
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/clang-format --dry-run --Werror kernels/csrc/*
	$(BIN)/pyright
	$(BIN)/python -m tests.structure
	$(BIN)/python -m benchmarks.readme --check

# The manual, in build/site
docs: $(READY)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Training steps on this machine, switch by switch. make bench BENCH=--quick
bench: $(READY)/bench
	$(BIN)/vlmr1 bench $(BENCH)

# CPU figures of the ops alone. Against an earlier run: make bench-ops BENCH=--benchmark-save=before, and later
# make bench-ops BENCH="--benchmark-compare=*before --benchmark-compare-fail=median:5%"
bench-ops: $(READY)/bench
	$(BIN)/pytest benchmarks -o python_files="bench_*.py" --benchmark-only \
		--benchmark-sort=name --benchmark-columns=min,median,iqr,rounds $(BENCH)

clean:
	rm -rf .venv .venv-cuda .venv-triton build vlmr1.egg-info kernels/vlmr1_kernels/native/*.so

$(BIN)/pip:
	$(PYTHON) -m venv .venv

# The native library is built by the installation, wherever a C++ compiler is.
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard kernels/csrc/*)

$(READY)/base: $(SOURCES) | $(BIN)/pip
	$(INSTALL) .
	@mkdir -p $(READY) && touch $@

$(READY)/%: $(SOURCES) | $(BIN)/pip
	$(INSTALL) ".[$*]"
	@mkdir -p $(READY) && touch $@

# As on a machine with a GPU that has little installed.
.venv-cuda/ready:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install -qq --disable-pip-version-check "$(TORCH_CUDA)" transformers accelerate liger-kernel peft \
		pytest numpy pillow || { echo "test-cuda-build: no CUDA build of torch could be installed" >&2; exit 1; }
	@touch $@
