# Every target makes the environment it needs in .venv; a fresh machine needs Python >= 3.11, pip and make only.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=2
ARGS ?=
# Whatever of these exists is linted.
SOURCES = $(wildcard hf_compress plugins tests examples benchmarks scripts)

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all quality style docs-check benchmarks peers clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## Make .venv with everything that tests and the demo need

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "hf_compress needs Python >= 3.11; '$(PYTHON)' is missing or older." \
			"Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev,demo]"
	@touch $@

demo: $(STAMP) ## Compress a real model on this machine and show what it cost
	$(RUN) $(BIN)/python examples/demo.py $(ARGS)

test: $(STAMP) ## The quick tests; those that need a GPU skip themselves where there is none
	$(RUN) $(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(STAMP) ## All tests, real models included
	$(RUN) $(BIN)/python -m pytest $(ARGS)

quality: $(STAMP) ## Lint, format, types, layers, lengths, docs: what CI runs before the tests
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_length.py
	$(RUN) $(BIN)/python scripts/check_docs.py
	$(BIN)/python scripts/readme_table.py --check
	$(BIN)/python scripts/ptq_tables.py --check
	$(BIN)/python scripts/training_tables.py --check
	$(RUN) $(BIN)/python scripts/compare_docs.py --check
	$(RUN) $(BIN)/python scripts/capabilities.py --check

style: $(STAMP) ## Format, and mend what ruff can mend
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

docs-check: $(STAMP) ## Every public name and command has a docstring and is in the docs
	$(RUN) $(BIN)/python scripts/check_docs.py

benchmarks: $(STAMP) ## Measure again what README's tables show
	$(RUN) $(BIN)/python benchmarks/run_all.py $(ARGS)

peers: $(STAMP) ## Measure calibrated methods beside other tools, in environments that this makes; takes hours
	$(RUN) $(BIN)/python -m benchmarks.ptq_peers $(ARGS)

clean: ## Remove the environment, caches and builds
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +
