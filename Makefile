# make demo   install what is missing, then make a sheet of what image prompts do
# make test   install what is missing, then run the fast tests
# make bench  measure what this machine can (long on a CPU), then write docs/reports/benchmarks.md
# make claims  measure the paper's claims on the packaged model (under an hour), then write docs/reports/claims.md
# make world  make the packaged model from nothing and measure it (hours); BUDGET=gpu: the larger one
# make floors  do the core tests pass with the oldest versions that pyproject.toml allows?
# make mutants  puts small faults into the code and counts what the tests notice (hours; MUTANTS='--rooms training --count 9')
# make rehearse  the same in 20 steps a stage, in a clone: does every stage run?
PYTHON ?= python3
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
INSTALLED := .venv/.installed
DEV_INSTALLED := .venv/.installed-dev

BUDGET ?= cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: demo bench claims world rehearse test test-slow lint floors mutants types check clean

demo: $(INSTALLED)
	$(BIN)/imprompt demo

bench: $(DEV_INSTALLED)
	$(BIN)/python -m benchmarks.all

claims: $(DEV_INSTALLED)
	$(BIN)/python -m studies.emoji claims

world: $(DEV_INSTALLED)
	$(BIN)/python -m studies.emoji all --budget $(BUDGET)

rehearse: $(DEV_INSTALLED)
	rm -rf runs/rehearsal
	git clone --quiet . runs/rehearsal
	ln -s ../../../../worlds/emoji/node_modules runs/rehearsal/worlds/emoji/node_modules
	cd runs/rehearsal && PYTHONPATH=src ../../$(BIN)/python -m studies.emoji all --budget $(BUDGET) --steps 20 --folder world

test: $(DEV_INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(DEV_INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(DEV_INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# The oldest versions that pyproject.toml allows, in an environment of their own (torch with CUDA on Linux: GB). Pictures in
# bfloat16 differ more from float32 with torch 2.10 than the test of half precision allows.
CORE := package adapter checkpoints encoders families other_families generate request engine compiled injection training

floors: $(DEV_INSTALLED)
	$(BIN)/uv venv --no-config --quiet --clear runs/floors
	$(BIN)/uv pip install --no-config --python runs/floors/$(notdir $(BIN))/python --resolution lowest-direct \
		-e '.[train,evaluate,kolors]' --group dev
	runs/floors/$(notdir $(BIN))/python -m pytest -W default $(CORE:%=tests/test_%.py) -k 'not half_precision'

mutants: $(DEV_INSTALLED)
	$(PIP) -c constraints.txt --group mutants
	$(BIN)/python -m tests.mutants $(MUTANTS)

types: $(DEV_INSTALLED)
	$(BIN)/pyright

check: lint types test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "imprompt needs Python 3.11 or newer; say which: make PYTHON=python3.12")'
	@echo "Making .venv, where everything is installed ..."
	$(PYTHON) -m venv .venv
	$(PIP) 'pip>=25.1'

# torch alone and first, so that its pinned build is the one that everything else finds.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing PyTorch into .venv, a few GB with CUDA on Linux: minutes ..."
	$(PIP) -c constraints.txt torch
	@echo "Installing imprompt and what it needs ..."
	$(PIP) -c constraints.txt -e .
	touch $@

$(DEV_INSTALLED): $(INSTALLED)
	@echo "Installing what tests and benchmarks need ..."
	$(PIP) -c constraints.txt -e '.[train,quantized,evaluate,kolors]' --group dev --group world
	touch $@

clean:
	rm -rf .venv
