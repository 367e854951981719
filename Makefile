# Everything below does its own set-up in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)

# Two processes of one thread: the models of the tests are tiny, and a second thread makes them slower. A file stays in
# one process, for its tests share what was slow to make.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-all test-coverage test-latest notebooks bench-check bench-check-quick \
	bench-gpu check format format-check docs docs-serve package-check clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## the package with its developer tools, in .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

quickstart: install  ## install, then DPO against SamPO in a small world, measured on this machine
	$(BIN)/sampo lab --fast --out lab-results

test: install  ## all tests but the slow ones
	$(TEST) -m "not slow"

test-slow: install  ## the slow tests
	$(TEST) -m slow

test-all: install  ## all tests
	$(TEST)

test-coverage: install  ## the tests of `make test`, and the share of lines that they run
	$(BIN)/python -m pip install -c constraints.txt pytest-cov
	$(TEST) -m "not slow" --cov=sampo --cov-report=term:skip-covered

# What leans on other libraries, with the newest versions that pyproject.toml allows, in an environment of its own.
LATEST := .venv-latest/bin
LATEST_TESTS := test_config.py data scoring training reference_cache checkpointing models diagnostics audit evaluation \
	commands lab

test-latest:  ## the tests that lean on TRL and transformers, with the newest versions that are allowed
	test -x $(LATEST)/python || $(PYTHON) -m venv .venv-latest
	$(LATEST)/python -m pip install -c constraints.txt $(TORCH)
	$(LATEST)/python -m pip install --upgrade --upgrade-strategy eager $(TORCH) -e '.[dev]'
	$(LATEST)/python -m pip list | grep -iE '^(torch|trl|transformers|accelerate|peft|datasets) '
	OMP_NUM_THREADS=1 $(LATEST)/python -m pytest -n 2 --dist loadfile -m "not slow" $(LATEST_TESTS:%=tests/%)

notebooks: install  ## run the notebooks anew and keep their outputs
	$(BIN)/python notebooks/execute.py

bench-check: install  ## measure the speed again, and compare it with benchmarks/baselines: minutes
	$(BIN)/python benchmarks/check.py

bench-check-quick: install  ## the same with a tiny model: seconds
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/check.py tiny

# Through `train()` with a model that fits with its optimiser; forward and backward pass alone with one that does not.
SWAP := $(BIN)/python benchmarks/class_swap.py --config qwen2.5-0.5b --steps 20 --warm_up 5
STEP := $(BIN)/python benchmarks/step_time.py --config llama-3-8b --repeats 3 --sides "TRL, reference cached" \
	"SamPO, stream, reference cached" "limit, reference cached"

bench-gpu: install  ## speed, memory and utilisation on one GPU with 80 GB
	$(SWAP) --shape hh --batch 32
	$(SWAP) --shape ultrafeedback --batch 16
	$(STEP) --shape hh --batch 16
	$(STEP) --shape ultrafeedback --batch 8

check: install  ## lint, format and types, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A banner about MkDocs 2, which pyproject.toml excludes
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: install  ## build the site into site/; a broken link or a page without an entry in the navigation is an error
	$(MKDOCS) build --strict

docs-serve: install  ## show the site at http://127.0.0.1:8000, and build it anew on each change
	$(MKDOCS) serve

package-check: install  ## build wheel and source archive into dist/, and check both
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

format: install  ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built; .venv and results stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +
