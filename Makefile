# One verb each. Everything happens in .venv; nothing is installed outside it.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
BUNDLE ?= bundles/dates
TARGET ?= 127.0.0.1:50051
BUILD := $(VENV)/.installed-for-building
DEV := $(VENV)/.installed-for-development

.PHONY: serve test lint bench loadtest protos clean help

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

serve: $(BUNDLE)/manifest.json | $(BUILD) ## Train the built-in model if there is none yet, export it, serve it on 127.0.0.1:50051
	$(BIN)/python -m server $(BUNDLE)

test: $(DEV) ## Run every test that needs no GPU and no file from outside the repository
	$(BIN)/python -m pytest

lint: $(DEV) ## Check style, types and the import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV) ## Measure the engine's decode loop beside the PyTorch reference
	$(BIN)/python -m tests.bench.engine

loadtest: $(DEV) ## Measure a running server under Poisson load: latency table and curve
	mkdir -p build
	$(BIN)/python -m tests.load --target $(TARGET) --png build/load.png --json build/load.json

protos: $(DEV) ## Generate the stubs from protos/*.proto
	$(BIN)/python -m protos.generate

clean: ## Remove what make created, but not trained models
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

bundles/dates/manifest.json: | $(BUILD)
	$(BIN)/python -m model train dates --out runs/dates $(if $(wildcard runs/dates/last.safetensors),--resume,--force)
	$(BIN)/python -m export runs/dates bundles/dates

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(BUILD): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[cpu,export]'
	touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[dev]'
	touch $@ $(BUILD)
