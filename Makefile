# Needs Python 3.11, pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV   ?= .venv
HOST   ?= 127.0.0.1
PORT   ?= 30000
DEMO   ?= .demo
BIN    := $(VENV)/bin

# One thread per process: SGLang runs three, and OpenMP's spinning costs more than it gains on few cores.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help serve demo venv test test-full reproduce check format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make serve      install, make the demo model, start the server on $(HOST):$(PORT) (PORT=... to change)"
	@echo "make test       unit, white-box and live tests"
	@echo "make test-full  the same and the long ones"
	@echo "make reproduce  the paper's experiments in simulated time, half an hour; TRACE=FILE adds a real trace"
	@echo "make check      lint, types, import rules, generated pages"
	@echo "make docs       write the generated pages again"
	@echo "make clean      remove what make made, .venv and the demo model included"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# One stamp per set of extras, so that a change of pyproject.toml installs again.
$(VENV)/.demo-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[demo]'
	@touch $@

$(VENV)/.dev-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

venv: $(VENV)/.dev-installed

demo: $(VENV)/.demo-installed
	$(BIN)/python -m elora_sglang.demo $(DEMO)

serve: demo
	$(BIN)/python -m elora_sglang.demo.serve $(DEMO) --host $(HOST) --port $(PORT)

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest

test-full: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -m 'full or not full'

# Conversations for the gap to the clairvoyant reference; make reproduce TRACE=mooncake_conversation.jsonl
TRACE ?=
reproduce: $(VENV)/.dev-installed
	$(BIN)/python -m elora_sglang.eval reproduce $(if $(TRACE),--trace $(TRACE))
	$(BIN)/python -m elora_sglang.eval reproduce $(if $(TRACE),--trace $(TRACE)) --json > reproduce.json
	$(BIN)/python -m elora_sglang.eval report reproduce.json --out report

check: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/support/import_rules.py
	$(BIN)/python -m elora_sglang.integration.plugin.flags --check
	$(BIN)/python -m elora_sglang.patches.table --check

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev-installed
	$(BIN)/python -m elora_sglang.integration.plugin.flags --write
	$(BIN)/python -m elora_sglang.patches.table --write

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
