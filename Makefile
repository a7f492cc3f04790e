# make demo | test | test-fast | lint | bench: each sets up what it needs, once, in .venv
# On a machine with a GPU: make demo TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= 2

BIN := .venv/bin
READY := .venv/ready
# TORCH is named in every installation, so that no extra can replace the build that was asked for.
INSTALL = $(BIN)/pip install -qq --disable-pip-version-check "$(TORCH)" --editable

.PHONY: demo test test-fast lint bench clean
.NOTPARALLEL:

demo: $(READY)/base
	$(BIN)/vlmr1 demo

test: lint $(READY)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

test-fast: $(READY)/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) -m "not slow"

# pyright reads the packages that the tests and benchmarks import
lint: $(READY)/lint $(READY)/test $(READY)/bench
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/pyright

bench: $(READY)/bench
	$(BIN)/python -m benchmarks.step --profile --out benchmarks/results/step.json

clean:
	rm -rf .venv build vlmr1.egg-info

$(BIN)/pip:
	$(PYTHON) -m venv .venv

$(READY)/base: pyproject.toml setup.py | $(BIN)/pip
	$(INSTALL) .
	@mkdir -p $(READY) && touch $@

$(READY)/%: pyproject.toml setup.py | $(BIN)/pip
	$(INSTALL) ".[$*]"
	@mkdir -p $(READY) && touch $@
