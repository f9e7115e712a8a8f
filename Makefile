# Everything goes through .venv, made on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs

.PHONY: bench test test-all test-cluster lint format benchmarks gpu reference docs
bench: $(STAMP)            ## generate the dataset, run the quick suite, print the table
	$(BIN)/ssodbench suite suite=quick

test: $(STAMP)             ## everything but the tests marked slow, gpu or cluster
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not gpu and not cluster"

test-all: $(STAMP)         ## the slow tests too, and the gpu ones where there is a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not cluster"

test-cluster: $(STAMP)     ## runs and suites on a real Slurm, which they start here (as root, where it is installed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -m cluster tests/cluster

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: $(STAMP)       ## speed, never part of the tests, beside the baseline of this kind of machine; ARGS=--write makes that
	$(BIN)/python benchmarks/compare.py $(ARGS)

gpu: $(STAMP)              ## what a GPU is to prove, within 9 minutes; a reduced form where there is none. OUT=DIR
	$(BIN)/python benchmarks/gpu.py $(if $(OUT),--out $(OUT)) $(ARGS)

reference: $(STAMP)        ## docs/reference/keys.md, out of the comments in harness/conf
	mkdir -p docs/reference
	$(BIN)/python -c 'from harness.config import reference; print(reference.page(), end="")' > docs/reference/keys.md

docs: $(DOCS_STAMP)        ## the documentation as a site in site/; a warning or a broken link is an error
	$(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cu13,test]'
	touch $@
