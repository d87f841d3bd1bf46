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

.PHONY: help serve demo venv test test-nightly test-full reproduce check format docs surface-diff release clean
.DEFAULT_GOAL := help

help:
	@echo "make serve         install, make the demo model, start the server on $(HOST):$(PORT) (PORT=... to change)"
	@echo "make test          unit, white-box and live tests; TESTS='tests/core tests/runtime' for some of them"
	@echo "make test-nightly  the random tests with fresh seeds, and the long random lives of the core"
	@echo "make test-full     the same and the long ones"
	@echo "make reproduce     the paper's experiments in simulated time, half an hour; TRACE=FILE adds a real trace"
	@echo "make check         lint, types, import rules, generated pages"
	@echo "make docs          write the generated pages again"
	@echo "make surface-diff  what SGLang NEW=0.5.24 would change for us"
	@echo "make release       wheel and sdist of what is committed, checked in a clean environment, into dist/"
	@echo "make clean         remove what make made, .venv and the demo model included"

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

# Folders or files; none of them means all.
TESTS ?=
test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest $(TESTS)

# `make test` draws fixed seeds. A failure here names its seed; tests/support/seeds.py says how to keep it.
SEEDED = $(shell grep -rl --include='test_*.py' 'support.* import seeds' tests | grep -v -e '^tests/core/' -e interpreted/)
test-nightly: $(VENV)/.dev-installed
	ELORA_FRESH_SEEDS=1 $(BIN)/python -m pytest -m 'full or not full' tests/core
	ELORA_FRESH_SEEDS=1 $(BIN)/python -m pytest $(SEEDED) tests/kernels/test_interpreter.py tests/runtime/pool

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
	$(BIN)/python -m elora_sglang.patches.surface --check

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev-installed
	$(BIN)/python -m elora_sglang.integration.plugin.flags --write
	$(BIN)/python -m elora_sglang.patches.table --write
	$(BIN)/python -m elora_sglang.patches.surface --write

# The release that we support, as pyproject.toml pins it, and the one to compare with.
OLD ?= $(shell sed -n 's/^ *"sglang==\([0-9.]*\)",$$/\1/p' pyproject.toml)
surface-diff: $(VENV)/.dev-installed
	$(BIN)/python -m elora_sglang.patches.surface --diff $(OLD) $(NEW)

release: $(VENV)/.dev-installed
	$(BIN)/python tests/support/release.py --out dist

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
