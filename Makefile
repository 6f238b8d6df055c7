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

.PHONY: help setup demo test check format schema clean distclean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)$$/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

setup: $(INSTALLED) ## virtual environment in .venv, pinned dependencies, the editable package

demo: setup ## the whole job on real material: jobs/demo.yaml, report in runs/demo/report
	@$(BIN)/python jobs/materials.py demo --cache $(MATERIALS)
	@$(BIN)/softshard run jobs/demo.yaml

test: setup ## all tests; fetches the model that the slowest few use
	@$(BIN)/python jobs/materials.py model --cache $(MATERIALS)
	$(BIN)/pytest $(ARGS)

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

clean: ## remove runs/, downloaded material and the caches of the tools
	rm -rf runs .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv
	rm -rf $(VENV) pipeline/softshard.egg-info

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
	@$(PIP) --editable '.[demo,dev]' --build-constraint constraints.txt
	@rm -f $@.begun; touch $@
